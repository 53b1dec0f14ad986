"""What a run may continue, and what it is told has changed."""

import json

import pytest

from maskmatch_scale.checkpoints.finding import find
from maskmatch_scale.checkpoints.fit import changes, check_fit, model_facts, run_facts
from maskmatch_scale.checkpoints.layout import CheckpointError
from tests.checkpoints.made_up import STATE, write

SHAPES = {name.removeprefix("student/"): tuple(v.shape) for name, v in STATE.items() if name.startswith("student/")}


@pytest.fixture
def checkpoint(tmp_path, make_recipe):
    folder = write(tmp_path / "checkpoints").folder
    found = find(folder)
    found.state["model"] = facts(make_recipe())
    return found


def facts(recipe, head="segformer", classes=("ground", "square", "disc")):
    return json.loads(json.dumps(model_facts(recipe, head, len(classes), classes)))


def test_the_same_model_fits(checkpoint, make_recipe):
    check_fit(checkpoint, facts(make_recipe()), SHAPES)


def test_a_folder_with_the_backbone_may_lie_elsewhere(make_recipe):
    one, other = (make_recipe(model={"backbone": f"transformers/{path}/mine"}) for path in ("/a", "/b/c"))
    assert facts(one) == facts(other)


@pytest.mark.parametrize(
    ("model", "head", "classes", "message"),
    [
        ("timm/vit_tiny_patch16_224", "linear", None, "backbone transformers/segformer-b0, this run has timm/vit_tiny"),
        (None, "linear", None, "head segformer, this run has linear"),
        (None, "segformer", ("ground", "square"), "number of classes 3, this run has 2"),
        (None, "segformer", ("ground", "disc", "square"), "classes ground, square, disc, this run has ground, disc"),
    ],
)
def test_another_model_is_one_short_line(checkpoint, make_recipe, model, head, classes, message):
    recipe = make_recipe(**({"model": {"backbone": model}} if model else {}))
    with pytest.raises(CheckpointError) as error:
        # Shapes differ too, but the model is named first.
        check_fit(checkpoint, facts(recipe, head, classes or ("ground", "square", "disc")), {})
    text = str(error.value)
    assert message in text
    assert str(checkpoint.folder) in text
    assert len(text) < len(str(checkpoint.folder)) + 300
    assert "\n" not in text


def test_another_size_is_one_short_line(checkpoint, make_recipe):
    shapes = SHAPES | {"backbone.weight": (4, 8)} | {f"context.{number}": (1,) for number in range(500)}
    with pytest.raises(
        CheckpointError, match=r"backbone\.weight has shape \(4, 6\), in this run has shape \(4, 8\)"
    ) as e:
        check_fit(checkpoint, facts(make_recipe()), shapes)
    assert "500 more tensors differ" in str(e.value)
    assert len(str(e.value)) < len(str(checkpoint.folder)) + 400
    del shapes["backbone.weight"]
    with pytest.raises(CheckpointError, match="in this run is missing"):
        check_fit(checkpoint, facts(make_recipe()), {name: s for name, s in SHAPES.items() if "head" not in name})


def test_what_has_changed_is_told(make_recipe):
    recipe = make_recipe(engine={"micro_batch": 2, "zero_stage": 1, "precision": "fp32"})
    state = {"step": 7, **run_facts(recipe, 2)}
    assert changes(state, recipe, 2) == []
    assert changes({}, recipe, 2) == []
    other = make_recipe(engine={"micro_batch": 2, "zero_stage": 3, "precision": "fp32"})
    (line,) = changes(state, other, 2)
    assert line == "continued from step 7 with zero_stage=3 (was 1)"
    how, batch = changes(state, recipe, 4)
    assert how == "continued from step 7 with world_size=4 (was 2)"
    assert batch.startswith("a step takes 8 labelled images instead of 4: each sample of the epoch")
    same = make_recipe(engine={"micro_batch": 1, "zero_stage": 1, "precision": "fp32"})
    assert changes(state, same, 4) == [how]
