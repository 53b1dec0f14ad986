"""The benchmark of very many shards, with as few as are shared at all."""

import json
from pathlib import Path

import pytest

from maskmatch_scale.data.node_arrays import LARGE
from maskmatch_scale.data.shards.stored import LARGE_BYTES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def scale(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    from benchmarks.scale import __main__

    return __main__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--out", "x.md"), "must end in .json"), (("--out", "x.json", "--shards", "0"), "--shards: 0; it must be")],
)
def test_what_is_wrong_is_said(scale, capsys, arguments, message):
    assert scale.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow  # twenty-five processes
def test_the_whole_run(scale, tmp_path):
    out, shards = tmp_path / "scale.json", 60_000
    assert shards > LARGE
    assert scale.main(["--out", str(out), "--shards", str(shards), "--places", "500", "--rounds", "2"]) == 0
    result = json.loads(out.read_text())
    assert result["machine"]["json_mb"] * 1e6 > LARGE_BYTES
    rows = {(row["index"], row["over"], row["shared"], row["process"]): row for row in result["rows"]}
    for kind in ("json", "table", "wids"):
        each = rows[kind, "local", "off", "each"]
        first, second = (rows[kind, "local", "on", process] for process in ("first", "second"))
        assert each["shards"] == first["shards"] == second["shards"] == shards
        assert each["content"] == first["content"] == second["content"]
        assert each["mapped_mb"] < 1
        assert first["mapped_mb"] > 60_000 * 70 / 1e6
        assert second["private_mb"] < each["private_mb"]
    assert rows["json", "local", "on", "second"]["peak_mb"] < rows["json", "local", "on", "first"]["peak_mb"] / 2
    table = result["machine"]["table_mb"]
    assert rows["table", "http", "on", "first"]["sent_mb"] == pytest.approx(table, rel=0.05)
    assert rows["table", "http", "on", "second"]["sent_mb"] < 0.01  # index.json alone
    assert rows["json", "http", "on", "second"]["sent_mb"] > 8
    assert all(row["places"] for row in result["orders"])
    before, _, after = result["node"]
    assert (before["index"], before["shared"], after["index"], after["shared"]) == ("json", "off", "table", "on")
    assert after["extrapolated_mb"] < before["extrapolated_mb"] / 2
    assert "## Targets" in out.with_suffix(".md").read_text()
