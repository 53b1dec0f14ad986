"""The model of a run: what of a recipe it depends on."""

import json

import pytest

from maskmatch_scale.checkpoints.layout import CheckpointError
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.export import load_export
from maskmatch_scale.export.write import export_run
from maskmatch_scale.runs.evaluate import evaluate_run
from maskmatch_scale.runs.model import build_student, open_run
from maskmatch_scale.train import train
from tests.conftest import TINY_VIT

VIT = {"backbone": "timm/vit_tiny_patch16_224", "backbone_options": TINY_VIT, "unit_px": 16}


def student(recipe):
    return build_student(recipe, ShardIndex.load(recipe.data.root))


@pytest.mark.parametrize(
    ("name", "px"), [("vit_tiny_patch16_224", (224, 224)), ("eva02_tiny_patch14_224", (224, 224)),
                     ("vit_small_patch14_reg4_dinov2", (518, 518)), ("vit_small_patch16_dinov3", None)],
)  # fmt: skip
def test_a_position_embedding_has_the_models_own_grid_whatever_the_crop(make_recipe, name, px):
    options = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    model = {"backbone": f"timm/{name}", "backbone_options": options}
    states = []
    for crop in (56, [112, 224]):
        built = student(make_recipe(data={"crop_px": crop}, model=model, method={"mask": {"keep": None}}))
        assert built.encoder.position_px == px
        states.append({name: value.shape for name, value in built.state_dict().items()})
    assert states[0] == states[1]


def test_a_run_goes_on_with_other_crops(make_recipe):
    recipe = make_recipe(model=VIT, run={"steps": 1})
    run = train(recipe)
    train(make_recipe(model=VIT, data={"crop_px": [64, 96]}, run={"steps": 2}), resume="auto")
    assert open_run(run, "ema")[2] == 2
    (record,) = evaluate_run(run, "val", ("ema",))
    assert record["inference"].startswith("sliding windows of 64×96 px")


def test_a_run_of_before_is_read_with_the_grid_of_its_crops(make_recipe, tmp_path):
    """Then the embedding was laid out for the crop, as it is now for `img_size`."""
    old = {**VIT, "backbone_options": {**TINY_VIT, "img_size": [64, 96]}}
    run = train(make_recipe(model=old, data={"crop_px": [64, 96]}, run={"steps": 1}))
    assert open_run(run, "ema")[1].encoder.position_px == (64, 96)
    export_run(run, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "segmenter.json").read_text())
    assert described["position_px"] == [64, 96]
    assert load_export(tmp_path / "out").encoder.position_px == (64, 96)
    # Its export did not say so.
    del described["position_px"], described["backbone_options"]["img_size"]
    (tmp_path / "out" / "segmenter.json").write_text(json.dumps(described))
    assert load_export(tmp_path / "out").encoder.position_px == (64, 96)
    # Its recipe did not, either.
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("    img_size:\n    - 64\n    - 96\n", ""))
    with pytest.raises(CheckpointError, match=r"backbone\.pos_embed .* add model\.backbone_options\.img_size"):
        open_run(run, "ema")
    with pytest.raises(CheckpointError, match=r"backbone\.pos_embed .* compare model\.backbone_options \(img_size"):
        train(make_recipe(model=VIT, data={"crop_px": [64, 96]}, run={"steps": 2}), resume="auto")
