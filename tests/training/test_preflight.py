"""What is refused before a run writes anything, since it needs to know the backbone."""

import json
import shutil
from pathlib import Path

import pytest

from maskmatch_scale.errors import UserError
from maskmatch_scale.train import train


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"optim": {"layer_decay": 0.7}},
            "optim.layer_decay=0.7 with model.backbone=transformers/segformer-b0: it is defined for a ViT's blocks; "
            "set optim.layer_decay=1",
        ),
    ],
)
def test_what_the_backbone_cannot_do_is_refused_before_anything_is_written(make_recipe, sections, message):
    recipe = make_recipe(**sections)
    with pytest.raises(UserError) as caught:
        train(recipe)
    assert str(caught.value) == message
    assert not Path(recipe.run.dir).exists()


def test_the_best_cannot_be_kept_without_an_evaluation(make_recipe, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "shapes")
    index = json.loads((root / "index.json").read_text())
    del index["streams"]["dev"]
    (root / "index.json").write_text(json.dumps(index))
    recipe = make_recipe(data={"root": str(root)}, run={"keep_last": 0})
    with pytest.raises(UserError, match=r"run\.keep_best=1 with run\.keep_last=0 .* has no labelled split `dev`"):
        train(recipe)
    assert not Path(recipe.run.dir).exists()
