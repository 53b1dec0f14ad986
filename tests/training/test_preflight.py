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


def test_a_run_without_dev_says_so(make_recipe, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "shapes")
    said = "no labelled stream `dev` in data.root: nothing is evaluated during training"
    whole = train(make_recipe(data={"root": str(root)}, run={"steps": 1}))
    assert said not in (whole / "log" / "rank-0.txt").read_text()
    index = json.loads((root / "index.json").read_text())
    for stream, options in (("dev", "--dev 0.1"), ("val", "--dev 0.1 --val 0.1")):
        del index["streams"][stream]
        (root / "index.json").write_text(json.dumps(index))
        run = train(make_recipe(data={"root": str(root)}, run={"steps": 1, "dir": str(tmp_path / stream)}))
        (line,) = (line for line in (run / "log" / "rank-0.txt").read_text().splitlines() if said in line)
        assert line.endswith(f"held-out samples come from `maskmatch shards write … {options}`")


def test_the_best_cannot_be_kept_without_an_evaluation(make_recipe, shapes, tmp_path):
    root = shutil.copytree(shapes, tmp_path / "shapes")
    index = json.loads((root / "index.json").read_text())
    del index["streams"]["dev"]
    (root / "index.json").write_text(json.dumps(index))
    recipe = make_recipe(data={"root": str(root)}, run={"keep_last": 0})
    with pytest.raises(UserError, match=r"run\.keep_best=1 with run\.keep_last=0 .* has no labelled split `dev`"):
        train(recipe)
    assert not Path(recipe.run.dir).exists()
