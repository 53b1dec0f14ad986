"""`data.remap`: a run, its evaluation and its export are as on a folder that was written with these classes."""

import json
from dataclasses import dataclass

import pytest
import torch

from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.decode import decode_label
from maskmatch_scale.data.images.encode import encode_label
from maskmatch_scale.data.images.remap import remap_classes
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.data.shards.index import ShardIndex, StreamEntry
from maskmatch_scale.data.writing.protocol import EncodedSample
from maskmatch_scale.errors import UserError
from maskmatch_scale.export.write import export_run
from maskmatch_scale.recipe import DataRecipe
from maskmatch_scale.runs.evaluate import evaluate_run
from maskmatch_scale.runs.model import open_run
from maskmatch_scale.train import train
from tests.conftest import ShapesSource, write_shards

MERGED = {"square": "thing", "disc": "thing"}
COUNTS = {"labelled": 8, "unlabelled": 24, "dev": 5, "val": 5}


@dataclass(frozen=True)
class Remapped(ShapesSource):
    """The shapes, written with other classes."""

    classes: tuple[str, ...] = ("ground", "thing")
    palette: tuple[tuple[int, int, int], ...] = ((0, 0, 0), (255, 0, 0))
    table: tuple[int, ...] = (0, 1, 1)

    @staticmethod
    def render(item):
        sample = ShapesSource.render(item)
        if sample.label is None:
            return sample
        label = decode_label(sample.label, "x").numpy()
        label[label == 2] = 1
        return EncodedSample(sample.key, sample.image, sample.extension, encode_label(label))


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    root = tmp_path_factory.mktemp("merged")
    write_shards(Remapped(COUNTS), root, workers=1, samples_per_shard=4, progress=False)
    return root


def make_batches(make_recipe, **data):
    return TrainingBatches(make_recipe(data=data), 2 if data.get("remap") else 3, 0, 1, unlabelled=True)


def records(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    timed = ("seconds", "per_second", "time", "wait", "mfu", "memory", "gb")
    return [{k: v for k, v in line.items() if not any(word in k for word in timed)} for line in lines]


def test_a_run_is_bit_for_bit_that_of_a_folder_with_these_classes(make_recipe, merged, tmp_path):
    method = {"class_weights": "inverse_sqrt", "threshold": {"default": 0.3, "thing": 0.25}}
    found = []
    for name, data in (("a", {"remap": MERGED}), ("b", {"root": str(merged)})):
        data = {**data, "rare_class_crops": 0.5}
        run = train(
            make_recipe(data=data, method=method, run={"dir": str(tmp_path / name), "steps": 2, "evaluate_every": 2})
        )
        weights = open_run(run, "student")[1].state_dict()
        (score,) = evaluate_run(run, "val", ("student",))
        said = json.loads((run / "data.json").read_text())
        losses = [(r["step"], r["loss"]) for r in records(run) if r["kind"] == "train"]
        scores = [r["miou"] for r in records(run) if "miou" in r]
        found.append((weights, losses, scores, score["iou"], score["miou"], said["classes"], said["palette"]))
    (weights, *one), (others, *other) = found
    assert one == other
    assert len(one[0]) == 2
    assert len(one[1]) >= 1
    assert list(one[2]) == ["ground", "thing"]
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)


def test_names_and_colours_of_an_export_are_those_after_it(make_recipe, tmp_path):
    run = train(make_recipe(data={"remap": {"square": "box", "disc": "ignore"}}, run={"steps": 1, "evaluate_every": 0}))
    export_run(run, tmp_path / "export")
    said = json.loads((tmp_path / "export" / "config.json").read_text())
    assert said["id2label"] == {"0": "ground", "1": "box"}
    classes = json.loads((run / "pictures" / "dev" / "classes.json").read_text()) if (run / "pictures").exists() else {}
    assert classes.get("classes", ["ground", "box"]) == ["ground", "box"]


def test_a_run_continues_with_the_classes_that_it_has_learnt(make_recipe):
    recipe = make_recipe(data={"remap": MERGED}, run={"steps": 1, "evaluate_every": 0})
    train(recipe)
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"remap": {"disc": "ignore"}})})
    with pytest.raises(UserError, match=r"classes ground, thing, this run has ground, square; compare data\.remap"):
        train(other, "auto")
    whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"remap": {}})})
    with pytest.raises(UserError, match=r"number of classes 2, this run has 3; compare data\.remap"):
        train(whole, "auto")


def test_pixels_of_classes_are_those_after_it(make_recipe):
    plain = make_batches(make_recipe).class_pixels().tolist()
    found = make_batches(make_recipe, remap=MERGED).class_pixels().tolist()
    assert found == [plain[0], plain[1] + plain[2]]


def test_sources_share_the_classes_after_it(make_recipe, shapes, merged):
    """A folder that has the merged classes already fits one whose classes are merged when they are read."""
    sources = [{"root": str(shapes)}, {"root": str(merged), "name": "merged"}]
    batches = make_batches(make_recipe, labelled=sources, remap=MERGED)
    one, other = (batches.labelled.sources[n].stream for n in (0, 1))
    for number in range(3):
        assert one[number].remap.map(decode_label(one[number].label, "x").numpy()).max() == 255
    assert (one.index.classes, other.index.classes) == (("ground", "thing"), ("ground", "thing"))
    pixels = make_batches(make_recipe, remap=MERGED).class_pixels()
    assert batches.class_pixels().equal(2 * pixels)
    with pytest.raises(DataError, match="its classes or its ignore_index are not those"):
        make_batches(make_recipe, labelled=sources, remap={"disc": "round"})


def test_labels_of_another_folder_are_remapped_as_that_folder_says(make_recipe, shapes, merged):
    for labels in (shapes, merged):
        data = {
            "labelled": [{"root": str(shapes), "stream": "labelled", "labels": str(labels)}],
            "remap": MERGED,
        }
        batches = make_batches(make_recipe, **data)
        plain = make_batches(make_recipe, remap=MERGED)
        assert batches.class_pixels().equal(plain.class_pixels())


def test_unlabelled_sources_may_have_other_classes(make_recipe, merged):
    batches = make_batches(make_recipe, unlabelled=[{"root": str(merged)}], remap=MERGED)
    assert batches.unlabelled.samples == 24


@pytest.mark.parametrize(
    ("remap", "said"),
    [
        ({"disk": "thing"}, r"data\.remap: the index has no class 'disk'; did you mean disc\?"),
        ({"square": "ignore", "disc": "ground"}, r"leaves only 'ground' of 3 classes"),
    ],
)
def test_a_wrong_remap_is_one_line_before_the_run(make_recipe, remap, said):
    recipe = make_recipe(data={"remap": remap})
    with pytest.raises(UserError, match=said) as error:
        train(recipe)
    assert "\n" not in str(error.value)


def test_an_index_without_classes_has_nothing_to_remap(tmp_path):
    write_shards(ShapesSource({"unlabelled": 2}, classes=(), palette=()), tmp_path, workers=1, progress=False)
    with pytest.raises(DataError, match=r"data\.remap: the index names no classes"):
        load_index(str(tmp_path), DataRecipe(root=str(tmp_path), remap=MERGED))


def test_known_pixels_of_classes_follow(shapes):
    index = ShardIndex.load(shapes)
    entry = index.streams["labelled"].model_copy(update={"class_pixels": (5, 6, 7, 8)})
    assert isinstance(entry, StreamEntry)
    index = index.model_copy(update={"streams": {"labelled": entry}})
    made = index.remapped({"disc": "ignore"})
    assert made.streams["labelled"].class_pixels == (5, 6, 15)
    assert made.remap == remap_classes(index.classes, index.palette, 255, {"disc": "ignore"})
    assert made.with_shards("labelled", [0]).remap == made.remap
    assert index.remap is None
