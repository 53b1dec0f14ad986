"""The benchmark runs and its figures fit together; nothing here depends on how fast the machine is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
KEYS = [
    *("backbone", "image_size", "batch", "dtype", "pass", "mode", "keep"),
    *("img_per_s", "gmacs", "speedup", "ideal_speedup", "efficiency", "peak_mb"),
]

Main = Callable[[Sequence[str]], int]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Iterator[Main]:
    """The command in this process: importing torch and timm anew costs more than the run."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import masked_vs_full

    threads = torch.get_num_threads()
    yield masked_vs_full.main
    torch.set_num_threads(threads)


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    """A SegFormer of 8 channels, with depthwise convolutions and spatial reduction as in the official sizes."""
    config = {"model_type": "segformer", "depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8]}
    config |= {"num_attention_heads": [1, 1, 1, 1], "mlp_ratios": [2, 2, 2, 2], "decoder_hidden_size": 8}
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    return f"transformers/{tmp_path / 'tiny'}"


def test_rows_have_the_contracts_keys_and_agree_with_each_other(main: Main, backbone: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "result.json"
    command = f"--out {out} --backbone {backbone} --image-size 128 --batch 2 --keep 0.5 1 --repeats 2"
    assert main(command.split()) == 0
    result = json.loads(out.read_text())
    assert out.with_suffix(".png").stat().st_size > 1000
    assert f"| {' | '.join(KEYS)} |" in out.with_suffix(".md").read_text()
    assert {"cpu", "threads", "python", "torch", "timm", "transformers", "commit", "date"} <= result["machine"].keys()
    assert str(tmp_path) not in json.dumps(result["machine"])

    rows: list[dict[str, Any]] = result["rows"]
    found = {(row["pass"], row["mode"], row["keep"]): row for row in rows}
    modes = [("full", 1.0), ("drop", 0.5), ("zero", 0.5), ("drop", 1.0), ("zero", 1.0)]
    assert list(found) == [(kind, *mode) for kind in ("forward", "train") for mode in modes]
    for row in rows:
        full = found[row["pass"], "full", 1.0]
        assert list(row)[: len(KEYS)] == KEYS
        assert row["speedup"] == pytest.approx(full["seconds_min"] / row["seconds_min"], rel=1e-4)
        assert row["ideal_speedup"] == pytest.approx(full["gmacs"] / row["gmacs"], rel=1e-4)
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["ideal_speedup"], rel=1e-4)
        assert row["img_per_s"] == pytest.approx(2 / row["seconds_min"], rel=1e-4)
        assert 0 < row["seconds_min"] <= row["seconds_median"]
        assert row["mode"] != "zero" or row["gmacs"] == full["gmacs"]
    for kind in ("forward", "train"):
        assert found[kind, "drop", 0.5]["gmacs"] < found[kind, "drop", 1.0]["gmacs"]
        assert found[kind, "drop", 0.5]["peak_mb"] < found[kind, "drop", 1.0]["peak_mb"]
    # Every product has two of its size in backward, but for the images, which need no gradient.
    assert 2.5 < found["train", "full", 1.0]["gmacs"] / found["forward", "full", 1.0]["gmacs"] < 3


def test_counts_a_grouped_convolution_and_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.harness import count_gmacs, peak_mb

    images = torch.zeros(2, 8, 10, 10, requires_grad=True)
    conv = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
    macs = 2 * 8 * 100 * 9
    assert count_gmacs(lambda: conv(images)) * 1e9 == pytest.approx(macs)
    assert count_gmacs(lambda: conv(images).sum().backward()) * 1e9 == pytest.approx(3 * macs)

    def two_then_one() -> torch.Tensor:
        first, second = torch.zeros(250_000), torch.zeros(250_000)
        return first + second.shape[0]  # a third, while both are alive

    held = [torch.zeros(500_000)]
    assert peak_mb(two_then_one, held, torch.device("cpu")) == pytest.approx(5, abs=0.01)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--keep", "0"], "keep: 0.0"),
        (["--backbone", "timm/no_such_model"], "no_such_model"),
        (["--image-size", "100"], "100×100"),
        (["--repeats", "0"], "--repeats: 0"),
        (["--device", "tpu"], "--device: 'tpu'"),
    ],
)
def test_wrong_options_are_named_in_one_line(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    out = tmp_path / "result.json"
    assert main(["--out", str(out), "--backbone", "timm/vit_tiny_patch16_224", *options]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_out_must_be_json(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "result.txt"), "--backbone", "timm/vit_tiny_patch16_224"]) == 2
    assert "--out" in capsys.readouterr().err
