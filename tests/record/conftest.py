"""Run directories in their true format, as training and evaluation leave them."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

CLASSES = {"background": (255, 255, 255), "note head": (200, 30, 30), "stem & beam": (30, 30, 200)}

WriteRun = Callable[..., Path]


def write_run(
    path: Path,
    *,
    method: Mapping[str, object],
    backbone: str = "transformers/segformer-b0",
    seed: int = 0,
    steps: int = 40,
    steps_asked: int = 40,
    burn_in: int = 10,
    scores: Mapping[tuple[str, str], float | None] | None = None,
    at_end: float | None = None,
    pictures: Sequence[str] = (),
    closed: bool = True,
) -> Path:
    """Write a run directory.

    Args:
        path: the run directory.
        method: section ``method`` of the recipe.
        backbone: ``model.backbone``.
        seed: ``run.seed``.
        steps: train records.
        steps_asked: ``run.steps``.
        burn_in: steps with the labelled loss alone, at ten times the speed.
        scores: mIoU by (split, weights), as ``maskmatch evaluate`` writes them.
        at_end: the teacher's mIoU on ``dev`` after the last step, as the run itself writes it.
        pictures: splits with pictures of two samples each.
        closed: whether ``summary.json`` is there.
    """
    path.mkdir(parents=True)
    recipe = {
        "data": {"root": "data/scores"},
        "model": {"backbone": backbone, "backbone_options": {}},
        "method": {"scales": [1.0], "burn_in": burn_in / max(1, steps)} | dict(method),
        "run": {"dir": str(path), "steps": steps_asked, "seed": seed},
    }
    (path / "recipe.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(recipe)))
    records = metrics(steps, burn_in)
    if at_end is not None:
        records.append({"kind": "eval", "step": steps, "split": "dev", "weights": "ema", "miou": at_end})
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for (split, weights), miou in (scores or {}).items():
        evaluation = {
            "split": split,
            "weights": weights,
            "step": steps,
            "miou": miou,
            "pixel_accuracy": 0.9,
            "iou": {"background": 0.99, "note head": miou, "stem & beam": None},
            "images": 2,
            "seconds": 1.5,
        }
        (path / "evaluation").mkdir(exist_ok=True)
        (path / f"evaluation/{split}-{weights}.json").write_text(json.dumps(evaluation))
    mask = method.get("mask")
    for split in pictures:
        write_pictures(path / "pictures" / split, masked=isinstance(mask, Mapping) and mask["keep"] is not None)
    if closed:
        closing = {"seconds": 247.4, "cpu_s": 480.0, "world_size": 2, "device": "cpu", "commit": "abc1234"}
        (path / "summary.json").write_text(json.dumps(closing))
    return path


def metrics(steps: int, burn_in: int = 0) -> list[dict[str, object]]:
    """Train records from step 1, and evaluations of both weights every ten steps."""
    records: list[dict[str, object]] = []
    for step in range(1, steps + 1):
        off = step <= burn_in
        records.append(
            {
                "kind": "train",
                "step": step,
                "loss": 2 / step,
                "loss_x": 1 / step,
                "loss_u": None if off else 1 / step,
                "loss_m": None,
                "lr": 1e-3,
                "grad_norm": 1.0,
                "coverage": None if off else 0.5,
                "images_per_s": 100.0 if off else 10.0,
                "data_wait_s": 0.01,
                "step_s": 0.4,
            }
        )
        if step % 10 == 0:
            for weights, miou in (("ema", step / 100), ("student", step / 200)):
                record = {"kind": "eval", "step": step, "split": "dev", "miou": miou, "pixel_accuracy": 0.8}
                records.append(record | {"weights": weights})
    return records


def write_pictures(folder: Path, *, masked: bool, size: tuple[int, int] = (48, 32)) -> None:
    """Two samples, and the classes beside them."""
    palette = list(CLASSES.values())
    for number, key in enumerate(("bach-bwv66.6", "haydn <opus> 74")):
        sample = folder / f"{number:04d}-{key}"
        sample.mkdir(parents=True)
        Image.linear_gradient("L").resize(size).convert("RGB").save(sample / "image.png")
        label_map = Image.new("P", size, color=1)
        label_map.putpalette([part for colour in palette for part in colour])
        for name in ["label", "prediction-ema", "prediction-student"] + ["prediction-visible"] * masked:
            label_map.save(sample / f"{name}.png")
        if masked:
            Image.new("RGB", size, (128, 128, 128)).save(sample / "visible.png")
    classes = {"classes": list(CLASSES), "palette": palette, "ignore_index": 255}
    (folder / "classes.json").write_text(json.dumps(classes))


SUPERVISED = {"base": "supervised", "mask": {"keep": None, "mode": "drop"}}
FIXMATCH = {"base": "fixmatch", "mask": {"keep": None, "mode": "drop"}}
MASKMATCH = {"base": "fixmatch", "mask": {"keep": 0.3, "mode": "drop"}, "scales": [0.5, 1.0, 1.5]}


@pytest.fixture
def runs_folder(tmp_path: Path) -> Path:
    """A folder with three complete runs of one backbone: ``supervised``, ``fixmatch``, ``maskmatch``."""
    methods = {"supervised": (SUPERVISED, 0.47), "fixmatch": (FIXMATCH, 0.51), "maskmatch": (MASKMATCH, 0.5)}
    for name, (method, miou) in methods.items():
        scores = {("val", "ema"): miou, ("val", "student"): miou - 0.01}
        write_run(tmp_path / name, method=method, scores=scores, pictures=["val"])
    return tmp_path


@pytest.fixture(name="write_run")
def _write_run() -> WriteRun:
    """The writer, for tests that need other runs."""
    return write_run
