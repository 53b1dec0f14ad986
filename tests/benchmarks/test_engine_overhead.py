"""The benchmark of the engine: all variants do the same work, bytes are counted, states are what the formulas say."""

import json
from pathlib import Path

import pytest

TINY = {"embed_dim": 192, "depth": 2, "num_heads": 3}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2]))
    from benchmarks.engine_overhead import __main__

    return __main__


@pytest.mark.slow  # over a minute
@pytest.mark.distributed
def test_rows_of_two_ranks(benchmark, tmp_path):
    out = tmp_path / "overhead.json"
    tiny = ["--memory-backbone", "timm/vit_tiny_patch16_224", "--backbone-options", json.dumps(TINY)]
    sizes = ["--image-size", "64", "--batch", "2", "--classes", "3", "--rounds", "1"]
    assert benchmark.main(["--out", str(out), *tiny, *sizes, "--ranks", "2"]) == 0
    result = json.loads(out.read_text())
    # It would have stopped otherwise: every variant's weights are where DDP's are, those of ranks apart are not.
    for row in result["rows"]:
        assert row["apart"] <= row["tolerance"]
        assert row["apart_alone"] >= 2 * row["tolerance"]
        assert row["ratio"] > 0
        assert row["cpu_ratio"] > 0
    stages = {(row["zero_stage"], row["precision"]) for row in result["rows"] if row["library"] == "deepspeed"}
    assert {(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "autocast-bf16")} <= stages

    for row in result["teachers"]:
        if row["zero_stage"] == 3:
            assert row["ema_bytes"] == row["ema_collectives"] == 0
            # The control: what a forward gathers layer by layer is counted.
            assert row["forward_bytes"] > 1e6
        elif row["precision"] == "bf16":
            assert row["ema_bytes"] > 1e6
        else:
            assert row["ema_bytes"] == row["forward_bytes"] == 0

    for row in result["memory"]:
        # Of so small a model DeepSpeed's default keeps a good part whole.
        if (row["variant"], row["moment"]) == ("deepspeed ZeRO-2 bf16", "all gradients there"):
            # DeepSpeed keeps what it turned into fp32 in 16 bits, too, until its step: at most 2 bytes a parameter.
            assert 0 <= row["memory_mb"] - row["formula_mb"] <= 2 * row["parameters"] / 1e6
        elif row["zero_stage"] != 3 or row["persistence_threshold"] == 0 or row["part"] == "teacher":
            assert abs(row["deviation"]) < 0.1
    assert out.with_suffix(".png").stat().st_size > 5000
    assert "(4+4+4+8)Ψ/N" in out.with_suffix(".md").read_text()


def test_chosen_variants(benchmark):
    from benchmarks.engine_overhead.variants import BF16, FP32
    from benchmarks.engine_overhead.worker import chosen

    assert chosen(FP32, None) == list(FP32)
    names = [variant.name for variant in chosen(BF16, ["ZeRO-1 bf16", "ZeRO-3"])]
    ours = ["ZeRO-1 bf16", "ZeRO-3 bf16"]
    ours += ["ZeRO-1 bf16, bf16 gradients", "ZeRO-3 bf16, bf16 gradients"]
    assert names == ["ddp autocast-bf16", *(f"deepspeed {name}" for name in ours)]


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--batch", "0"], "--batch: 0"), (["--ranks", "0"], "--ranks: 0"), (["--backbone", "timm/resnet50"], "resnet50")],
)
def test_mistakes_are_one_line(benchmark, tmp_path, capsys, options, named):
    out = tmp_path / "overhead.json"
    assert benchmark.main(["--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not out.exists()
