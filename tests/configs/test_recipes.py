"""The recipes of `configs/`: what their heads say can be run, and each trains.

The commands that write shards are taken from the heads and run on small data sets in the layouts of the real ones. So
are the overrides. Every recipe then takes two steps, with a tiny backbone of its family and small crops.
"""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.planned_recipes import DATA, GPU, head_of, variants
from maskmatch_scale.data.writing.sources.classes import built_in_classes
from maskmatch_scale.planning.build import build
from maskmatch_scale.planning.hardware import cluster_of, gpu_named
from maskmatch_scale.planning.step_time import step_time
from maskmatch_scale.recipe import Recipe, load_recipe
from maskmatch_scale.train import train
from tests.conftest import TINY_SEGFORMER, draw_shapes

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRETRAINING = Path("pretraining/vit.yaml")
SPLITS = Path("UniMatch-V2/splits")
DATA_SETS = {"pascal": "voc", "cityscapes": "cityscapes", "ade20k": "ade20k", "coco": "coco"}
RECIPES = [Path(name, f"{family}.yaml") for name in DATA_SETS for family in ("vit", "segformer")]
TINY_VIT = {"depth": 4, "embed_dim": 48, "num_heads": 3}
LAUNCH = "launch/deepspeed.sh "


def commands(path: Path, start: str) -> list[list[str]]:
    """The commands in the head that begin with ``start``, as words without it."""
    found = [line.strip() for line in head_of(CONFIGS / path).splitlines() if line.strip().startswith(start)]
    return [shlex.split(line.removeprefix(start)) for line in found]


def small(recipe: Recipe) -> list[str]:
    """Overrides that keep family, head, base, masks and schedule, and make the rest small."""
    vit = recipe.model.backbone.startswith("timm/")
    return [
        f"model.backbone_options={json.dumps(TINY_VIT if vit else TINY_SEGFORMER)}",
        f"data.crop_px={84 if 'patch14' in recipe.model.backbone else 96}",
        *("model.pretrained=null", "data.workers=0", "engine.library=accelerate", "engine.zero_stage=0"),
        *("engine.precision=fp32", "engine.micro_batch=2", "engine.threads=1", "run.epochs=null", "run.steps=2"),
        *("run.log_every=1", "run.checkpoint_every=0", f"optim.warmup_steps={min(1, recipe.optim.warmup_steps)}"),
    ]


def two_steps(path: Path, *overrides: str) -> tuple[Recipe, list[dict]]:
    """The recipe as it ran, and the records of its two steps."""
    recipe = load_recipe(CONFIGS / path, overrides)
    recipe = load_recipe(CONFIGS / path, [*overrides, *small(recipe)])
    lines = (train(recipe) / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    assert [record["step"] for record in records] == [1, 2]
    assert all(math.isfinite(record["loss"]) for record in records)
    return recipe, records


def write_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_shapes(number)[0]).save(path)


def write_label(path: Path, number: int, values: tuple[int, ...]) -> None:
    """A label map whose three regions have the first three values, and pixels to ignore the last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    label = draw_shapes(number)[1]
    Image.fromarray(np.select([label == n for n in range(3)], values[:3], values[3]).astype(np.uint8)).save(path)


def write_split(folder: Path, pairs: dict[str, list[tuple[str, str]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in pairs.items():
        (folder / f"{name}.txt").write_text("".join(f"{image} {label}\n" for image, label in lines))


def data_set(name: str) -> None:
    """A data set of 4 labelled, 6 unlabelled and 2 validation images in its own layout, with a split, below here."""
    root, train_part, val_part, values = {
        "pascal": (Path("VOCdevkit/VOC2012"), "", "", (0, 5, 20, 255)),
        "cityscapes": (Path("cityscapes"), "train", "val", (7, 26, 11, 0)),
        "ade20k": (Path("ADEChallengeData2016"), "training", "validation", (1, 150, 7, 0)),
        "coco": (Path("coco"), "train2017", "val2017", (0, 80, 3, 255)),
    }[name]

    def pair(part: str, number: int) -> tuple[str, str]:
        city = f"aachen_{number:06d}_000019"
        return {
            "pascal": (f"JPEGImages/2007_{number:06d}.jpg", f"SegmentationClass/2007_{number:06d}.png"),
            "cityscapes": (
                f"leftImg8bit/{part}/aachen/{city}_leftImg8bit.png",
                f"gtFine/{part}/aachen/{city}_gtFine_labelIds.png",
            ),
            "ade20k": (f"images/{part}/ADE_{number:08d}.jpg", f"annotations/{part}/ADE_{number:08d}.png"),
            "coco": (f"{part}/{number:012d}.jpg", f"masks/{number:012d}.png"),
        }[name]

    pairs = [pair(train_part if number < 10 else val_part, number) for number in range(12)]
    for number, (image, label) in enumerate(pairs):
        write_image(root / image, number)
        write_label(root / label, number, values)
    split = {"pascal": "92", "cityscapes": "1_16", "ade20k": "1_64", "coco": "1_512"}[name]
    write_split(SPLITS / name / split, {"labeled": pairs[:4], "unlabeled": pairs[4:10]})
    write_split(SPLITS / name, {"val": pairs[10:]})
    if name == "pascal":
        (root / "ImageSets/Segmentation").mkdir(parents=True)
        for file, part in (("train", pairs[:10]), ("val", pairs[10:])):
            text = "".join(f"{Path(image).stem}\n" for image, _ in part)
            (root / "ImageSets/Segmentation" / f"{file}.txt").write_text(text)


@pytest.fixture
def written(tmp_path, monkeypatch, maskmatch):
    """Write the data set of a recipe, and its shards by the command in its head."""
    monkeypatch.chdir(tmp_path)

    def write(path: Path) -> Path:
        data_set(path.parts[0])
        (words,) = commands(path, "maskmatch shards write")
        code, _, err = maskmatch("shards", "write", *words, "--workers", 1)
        assert code == 0, err
        return tmp_path / load_recipe(CONFIGS / path).data.root

    return write


def test_every_recipe_is_tested():
    assert {CONFIGS / path for path in (*RECIPES, PRETRAINING)} == set(CONFIGS.glob("*/*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_a_recipe_trains_on_the_shards_that_its_head_writes(path, written):
    root = written(path)
    index = json.loads((root / "index.json").read_text())
    assert index["classes"] == list(built_in_classes(DATA_SETS[path.parts[0]]).names)
    samples = {name: sum(shard["samples"] for shard in stream["shards"]) for name, stream in index["streams"].items()}
    assert samples == {"labelled": 4, "unlabelled": 6, "val": 2}
    recipe, records = two_steps(path)
    assert recipe.method.mask.keep == 0.3
    assert all(record["loss_u"] is not None and record["loss_m"] is not None for record in records)
    for name, overrides in variants(CONFIGS / path).items():
        if name in ("S", "L", "b2"):  # they differ in size alone, and all are made tiny
            continue
        changed, records = two_steps(path, *overrides, f"run.dir=runs/{name.replace(' ', '-')}")
        assert all((record["loss_u"] is None) == (changed.method.base == "supervised") for record in records), name
        assert all((record["loss_m"] is None) == (changed.method.mask.keep is None) for record in records), name


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_the_launch_commands_of_a_head_are_valid(path):
    first, second = commands(path, LAUNCH)
    assert CONFIGS.parent / first[0] == CONFIGS.parent / second[0] == CONFIGS / path
    recipe, other = load_recipe(CONFIGS / path, first[1:]), load_recipe(CONFIGS / path, second[1:])
    assert recipe.data.root != other.data.root
    assert recipe.run.dir != other.run.dir
    names = {"vit": {"S", "L", "DINOv3", "UniMatch V2", "labels only"}, "segformer": {"b2", "FixMatch", "labels only"}}
    assert set(variants(CONFIGS / path)) == names[path.stem]


@pytest.mark.parametrize("path", [*RECIPES, PRETRAINING], ids=str)
def test_every_size_of_a_recipe_can_be_built_and_cut_into_whole_units(path):
    for overrides in ([], *variants(CONFIGS / path).values()):
        recipe = load_recipe(CONFIGS / path, overrides)
        student = build(recipe, gpu_named(GPU), DATA[path.parts[0]].classes).subject.student
        assert student.num_classes == DATA[path.parts[0]].classes
        if recipe.method.dropped:
            student.unit_grid(*recipe.data.crop_px)


@pytest.mark.parametrize("path", [*RECIPES, PRETRAINING], ids=str)
def test_a_recipe_is_planned(path):
    recipe = load_recipe(CONFIGS / path)
    recipe = load_recipe(CONFIGS / path, small(recipe))
    subject = build(recipe, gpu_named(GPU), DATA[path.parts[0]].classes).subject
    assert 0 < step_time(subject, cluster_of(1, gpu_named(GPU))).seconds < 10


def test_pretraining_without_labels(written, maskmatch):
    path = PRETRAINING
    written(Path("ade20k/vit.yaml"))
    two_steps(Path("ade20k/vit.yaml"), "run.dir=runs/ade20k-large")
    for number in range(8):
        write_image(Path("photos") / f"{number}.jpg", number)
    (words,) = commands(path, "maskmatch shards write")
    assert maskmatch("shards", "write", *words, "--workers", 1)[0] == 0
    _, records = two_steps(path)
    assert all(record["loss_x"] is None and record["loss_u"] is not None for record in records)
    own = "method.teacher=ema", "model.pretrained=runs/ade20k-large"
    recipe = load_recipe(CONFIGS / path, own)
    overrides = [*own, *(word for word in small(recipe) if not word.startswith("model.pretrained")), "run.dir=runs/own"]
    train(load_recipe(CONFIGS / path, overrides))
