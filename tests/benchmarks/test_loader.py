"""The benchmark of the loader at tiny sizes: all loaders read the same images, and the files say what they should."""

import json
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


_WITHOUT_PEERS = "; ".join(
    ["import benchmarks.loader.worker as w", "w._versions = lambda *names: dict.fromkeys(names)", "w.main()"]
)


@pytest.fixture
def loader(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.loader import __main__

    return __main__


@pytest.fixture
def task(loader, tmp_path):
    source = loader.PhotoSource(24, 64, 48)
    index = loader.write_shards(source, tmp_path / "photos", samples_per_shard=3, workers=1, progress=False)
    files = tuple(str(tmp_path / "photos" / shard.file) for shard in index.stream("unlabelled").shards)
    return loader.Task(
        str(tmp_path / "photos"), files, str(tmp_path / "peers"), str(tmp_path / "cache"), 4, 32, 8, workers=0
    )


@pytest.mark.slow  # fifteen processes, each of which imports torch
def test_the_whole_run_but_for_the_peers(loader, tmp_path, capsys):
    out = tmp_path / "loader.json"
    sizes = "--images 32 --width 64 --crop 32 --batch 4 --window 8 --samples 16 --rounds 1 --long-run 48"
    many = "--large-index 300 --state-shards 10001 --ranks 8"
    missing = tmp_path / "python"
    # An environment that has neither peer.
    missing.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{_WITHOUT_PEERS}"\n')
    missing.chmod(0o755)
    assert loader.main(["--out", str(out), "--other-python", str(missing), *sizes.split(), *many.split()]) == 0
    result = json.loads(out.read_text())
    rows = {(row["variant"], row["over"], row["processes"]): row for row in result["rows"]}
    local = [(name, "local", n) for name in ("bare", "ours", "webdataset") for n in (0, 2)]
    local += [("sequential", "local", n) for n in (0, 2)]
    http = [("ours", "http", 2), ("ours", "http, cached", 2), ("webdataset", "http", 2)]
    http += [("sequential", "http", n) for n in (0, 2)]
    for key in local + http:
        row = rows[key]
        assert row["samples_per_core_s"] == pytest.approx(16 / min(row["cpu_s"]))
        assert row["of_limit"] == pytest.approx(
            row["samples_per_core_s"] / rows["bare", "local", key[2]]["samples_per_core_s"]
        )
        assert (row["waiting"] is None) == (key[2] == 0)
    for name in ("litdata", "streaming"):
        assert "is not installed in --other-python" in rows[name, "local", 0]["skipped"]
    assert [row["step"] for row in result["resume"]] == [0, 4, 0, 4, 4, 10001 * 250 // 2 // 4]
    assert [row["changes"] for row in result["state"]] == list(range(9))
    assert result["state"][0]["bytes"] < result["state"][1]["bytes"]
    assert result["index"][0]["shards"] == 300
    assert [row["samples"] for row in result["memory"]] == list(range(0, 48, 4))
    for target in result["targets"]:
        least = "at least" in target["target"]
        above, below = target["measured"] >= target["bound"], target["measured"] <= target["bound"]
        assert target["met"] == (above if least else below)
    assert out.with_suffix(".png").stat().st_size > 5000
    page = out.with_suffix(".md").read_text()
    assert "litdata was left out" in page
    assert "| bytes of the state with 10001 shards" in page


def test_every_loader_makes_the_same_batches_of_the_same_images(loader, task):
    from benchmarks.loader import variants

    for name in ("bare", "ours", "sequential", "webdataset"):
        images, valid = _first(variants.VARIANTS[name](task))
        assert (images.shape, images.dtype) == ((4, 3, 32, 32), torch.uint8)
        assert (valid.shape, valid.dtype) == ((4, 32, 32), torch.bool)
    side_by_side = variants.bare(replace(task, workers=2))
    assert [next(side_by_side) for _ in range(3)] == [None] * 3
    side_by_side.close()


def _first(loader):
    batch = next(iter(loader))
    return batch if isinstance(batch, tuple) else (batch.unlabelled_images, batch.unlabelled_valid)


@pytest.mark.parametrize(("name", "library"), [("litdata", "litdata"), ("streaming", "streaming")])
def test_a_peer_where_it_is_installed(loader, task, name, library):
    pytest.importorskip(library)
    from benchmarks.loader import variants

    variants.write_peer(name, task.shards, task.peers)
    images, _ = _first(variants.VARIANTS[name](task))
    assert images.shape == (4, 3, 32, 32)


def test_cpu_time_of_loader_processes_is_counted(loader):
    from benchmarks.loader.worker import cpu_seconds

    before = cpu_seconds()
    burning = iter(torch.utils.data.DataLoader(range(3), num_workers=1, collate_fn=_burn, batch_size=1))
    assert list(burning) == [None] * 3
    del burning
    assert cpu_seconds() - before > 0.3


def _burn(_):
    import time

    end = time.process_time() + 0.15
    while time.process_time() < end:
        pass


def test_the_slope_of_a_line(loader):
    from benchmarks.loader.report import slope

    rows = [{"samples": n * 1000, "pss_mb": 500 + (100 - n if n < 50 else n / 10)} for n in range(100)]
    assert slope(rows)[0] == pytest.approx(1)
    assert slope(rows)[1] == pytest.approx(0, abs=1e-6)


def test_the_server_answers_ranges(loader, tmp_path):
    (tmp_path / "a").write_bytes(b"0123456789")
    with loader.serving(tmp_path, ROOT) as url:
        assert urllib.request.urlopen(f"{url}/a").read() == b"0123456789"
        asked = urllib.request.Request(f"{url}/a", headers={"Range": "bytes=3-5"})
        answer = urllib.request.urlopen(asked)
        assert (answer.status, answer.read()) == (206, b"345")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--images", "3"], "--images: 3"),
        (["--rounds", "0"], "--rounds: 0"),
        (["--other-python", "/no/such"], "/no/such"),
        (["--state-shards", "10"], "--state-shards: 10"),
    ],
)
def test_mistakes_are_one_line(loader, tmp_path, capsys, options, named):
    out = tmp_path / "loader.json"
    assert loader.main(["--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not out.exists()
