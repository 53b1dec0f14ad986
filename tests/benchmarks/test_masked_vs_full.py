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
    from benchmarks.masked_vs_full.__main__ import main

    threads = torch.get_num_threads()
    yield main
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
    assert {"cpu", "threads", "python", "torch", "timm", "transformers", "commit", "date"} <= result["machine"].keys()
    assert str(tmp_path) not in json.dumps(result["machine"])

    rows: list[dict[str, Any]] = result["rows"]
    found = {(row["pass"], row["mode"], row["keep"]): row for row in rows}
    modes = [("full", 1.0), ("library", 1.0), ("drop", 0.5), ("zero", 0.5), ("drop", 1.0), ("zero", 1.0)]
    assert list(found) == [(kind, *mode) for kind in ("forward", "train") for mode in modes]
    for row in rows:
        full = found[row["pass"], "full", 1.0]
        library = found[row["pass"], "library", 1.0]
        assert list(row)[: len(KEYS)] == KEYS
        assert row["part"] == "encoder"
        assert row["speedup"] == pytest.approx(full["seconds_min"] / row["seconds_min"], rel=1e-4)
        assert row["over_library"] == pytest.approx(library["seconds_min"] / row["seconds_min"], rel=1e-4)
        assert row["ideal_speedup"] == pytest.approx(full["gmacs"] / row["gmacs"], rel=1e-4)
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["ideal_speedup"], rel=1e-4)
        assert row["img_per_s"] == pytest.approx(2 / row["seconds_min"], rel=1e-4)
        assert 0 < row["seconds_min"] <= row["seconds_median"]
        assert 0 < row["wall_min"] <= row["wall_median"]
        assert row["mode"] == "drop" or row["ideal_speedup"] == 1
        assert (row["mode"] == "drop") == (row["gather_share"] is not None)
        if row["mode"] == "drop":  # a SegFormer with all units visible takes the path of whole images
            assert 0 <= row["gather_share"] < 1
            assert row["gather_share"] > 0 or row["keep"] == 1
        assert row["mfu"] is None
    for kind in ("forward", "train"):
        full, ours, library = found[kind, "full", 1.0], found[kind, "drop", 0.5], found[kind, "library", 1.0]
        assert ours["gmacs"] < found[kind, "drop", 1.0]["gmacs"] == full["gmacs"]
        # Without gradients so small a model needs more for its halos than whole images do.
        assert kind == "forward" or ours["peak_mb"] < found[kind, "drop", 1.0]["peak_mb"]
        # The faster of the two dense ways is what masking is measured against.
        assert full["seconds_min"] <= library["seconds_min"]
        assert (full["runner"] == "library") == (full["seconds_min"] == library["seconds_min"])
    # Every product has two of its size in backward, but for the images, which need no gradient.
    assert 2.5 < found["train", "full", 1.0]["gmacs"] / found["forward", "full", 1.0]["gmacs"] < 3

    peers = {(row["part"], row["pass"], row["mode"]): row for row in result["peers"]}
    assert len(peers) == len(result["peers"]) == 8
    for (part, kind, mode), row in peers.items():
        assert list(row)[: len(KEYS)] == KEYS
        assert row["speedup"] == pytest.approx(
            peers[part, kind, "library"]["seconds_min"] / row["seconds_min"], rel=1e-4
        )
        assert mode == "ours" or row["speedup"] == 1
        assert row["max_abs_difference"] < 1e-4  # the same weights, so the same result
    page = out.with_suffix(".md").read_text()
    assert f"| {' | '.join(KEYS)} | runner" in page
    assert "## Against the libraries as they ship" in page
    assert page.count("| whole model |") == 2
    assert "mfu" not in page


@pytest.mark.parametrize("name", ["timm/vit_tiny_patch16_224", "timm/eva02_tiny_patch14_224"])
def test_a_vit_of_timm_gives_what_ours_gives(main: Main, tmp_path: Path, name: str) -> None:
    """Also where the final norm lies behind `forward_features`, as in EVA02, which pools by an average."""
    out = tmp_path / "result.json"
    size = 112 if "14" in name else 64
    command = f"--out {out} --backbone {name} --image-size {size} --batch 1 --keep 0.5 --repeats 1"
    assert main(command.split()) == 0
    peers = json.loads(out.read_text())["peers"]
    assert [row["part"] for row in peers] == ["encoder"] * 4
    assert max(row["max_abs_difference"] for row in peers) < 1e-4


def test_the_gpu_preset_on_a_cpu(main: Main, backbone: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = f"--out {out} --preset gpu --device cpu --backbone {backbone} --image-size 64 --repeats 1"
    assert main([*command.split(), "--peak-tflops", "2"]) == 0
    result = json.loads(out.read_text())
    assert result["machine"]["peak_tflops_bfloat16"] == 2
    found = [(row["mode"], row["keep"]) for row in result["rows"] if row["pass"] == "forward"]
    # 0.1 of 2×2 units would leave none.
    keeps = [("zero", 0.3), ("drop", 0.3), ("drop", 0.5), ("drop", 0.75), ("drop", 1.0)]
    assert sorted(found) == sorted([("full", 1.0), ("library", 1.0), *keeps])
    for row in result["rows"] + result["peers"]:
        assert (row["dtype"], row["batch"]) == ("bfloat16", 4)
        assert row["mfu"] == pytest.approx(2 * row["gmacs"] * 1e9 * row["img_per_s"] / 2e12, rel=1e-4)
    assert "| mfu |" in out.with_suffix(".md").read_text()


def test_presets_own_sizes_are_rounded_to_whole_units(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.masked_vs_full.__main__ import parse, prepare

    options = ["--out", str(tmp_path / "x.json"), "--preset", "gpu", "--device", "cpu"]
    giant = ["--backbone", "timm/vit_giant_patch14_dinov2"]
    cases = prepare(parse([*options, *giant]))[0]
    assert [case.image_size for case in cases] == [504, 756, 1036]
    assert {case.dtype for case in cases} == {"bfloat16"}
    with pytest.raises(ValueError, match="504×504"):  # a size that was asked for is never changed
        prepare(parse([*options, *giant, "--image-size", "512"]))


def test_formula_and_dispatched_count_agree(monkeypatch: pytest.MonkeyPatch, backbone: str) -> None:
    """What is counted is what each mode needs, and our code computes no product more, masked or not."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.harness import count_gmacs
    from benchmarks.masked_vs_full.cases import Case, Variant, make_pass
    from maskmatch_scale.models.units import sample_visible

    for name in (backbone, "timm/vit_tiny_patch16_224"):
        case = Case(name, 128, 1, "float32")
        segmenter = case.build(torch.device("cpu"))
        library = case.build_library(segmenter)
        images = torch.zeros(1, 3, 128, 128)
        for mode, k in (("ours", None), ("library", None), ("drop", 8), ("drop", 16), ("zero", 8)):
            variant = Variant(mode, 1.0, None if k is None else sample_visible(1, (4, 4), k))
            for kind in ("forward", "train"):
                run = make_pass(variant.encoder(segmenter, library), images, segmenter, kind)
                needed = variant.gmacs(segmenter, 128, kind)
                assert count_gmacs(run) == pytest.approx(needed, rel=1e-9), (name, mode, kind)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--keep", "0"], "keep: 0.0"),
        (["--backbone", "timm/no_such_model"], "no_such_model"),
        (["--image-size", "100"], "100×100"),
        (["--repeats", "0"], "--repeats: 0"),
        (["--device", "tpu"], "--device: 'tpu'"),
        (["--zero-keep", "2"], "keep: 2.0"),
        (["--peak-tflops", "0"], "--peak-tflops: 0.0"),
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


@pytest.mark.parametrize("options", [["--dtype", "int8"], ["--preset", "tpu"], ["--batch", "two"], []])
def test_options_that_cannot_be_read_are_one_line_too(
    main: Main, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
