"""What is refused before a run writes anything, since it needs to know the backbone."""

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
