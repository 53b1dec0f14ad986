"""Values by the names of classes: what is taken, what is refused, and in which words."""

import pytest

from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe import RecipeError
from maskmatch_scale.recipe.by_class import thresholds_by_class, weights_by_class
from maskmatch_scale.train import train

CLASSES = ("ground", "square", "disc")


def test_weights(make_recipe):
    method = make_recipe(method={"class_weights": {"disc": 4, "square": 0}}).method
    assert weights_by_class(method, CLASSES, 3) == (1.0, 0.0, 4.0)
    assert weights_by_class(method, CLASSES, 5) == (1.0, 0.0, 4.0, 1.0, 1.0)
    for word in ("none", "inverse_sqrt"):
        assert weights_by_class(make_recipe(method={"class_weights": word}).method, CLASSES, 3) is None


def test_thresholds(make_recipe):
    def found(threshold, count=3):
        return thresholds_by_class(make_recipe(method={"threshold": threshold}).method, CLASSES, count)

    assert found(0.7) == 0.7
    assert found(1) == 1.0
    assert found({"disc": 0.8}) == (0.95, 0.95, 0.8)
    assert found({"default": 0.6, "disc": 0.8}, 4) == (0.6, 0.6, 0.8, 0.6)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"threshold": 1.5}, "method.threshold=1.5: it must be a number from 0 to 1, or a mapping of class names"),
        ({"threshold": True}, "method.threshold=true: it must be a number from 0 to 1, or a mapping of class names"),
        (
            {"threshold": {"disc": 95}},
            "method.threshold={…}: that of disc is 95; it must be a number from 0 to 1",
        ),
        (
            {"class_weights": "auto"},
            'method.class_weights="auto": it must be none, inverse_sqrt, or a mapping of class names to weights',
        ),
        (
            {"class_weights": {"disc": -1}},
            "method.class_weights={…}: the weight of disc is -1; it must be a number ≥ 0",
        ),
        (
            {"class_weights": {"disc": "high"}},
            "method.class_weights={…}: the weight of disc is 'high'; it must be a number ≥ 0",
        ),
    ],
)
def test_other_values_are_refused(make_recipe, method, message):
    with pytest.raises(RecipeError) as caught:
        make_recipe(method=method)
    assert str(caught.value) == f"recipe: {message}"


@pytest.mark.parametrize("key", ["threshold", "class_weights"])
def test_unknown_classes_are_refused_before_anything_is_written(make_recipe, tmp_path, key):
    with pytest.raises(UserError) as caught:
        train(make_recipe(method={key: {"disk": 0.5}}))
    assert str(caught.value) == (
        f"method.{key}: the data have no class 'disk'; did you mean 'disc'? (3 classes: ground, square, disc)"
    )
    assert not (tmp_path / "run").exists()


def test_a_labelled_loss_without_any_weight_is_refused(make_recipe, tmp_path):
    weights = dict.fromkeys(CLASSES, 0)
    with pytest.raises(UserError, match=r"method\.class_weights: all classes have the weight 0"):
        train(make_recipe(method={"class_weights": weights}))
    assert not (tmp_path / "run").exists()


def test_data_whose_classes_have_no_names(make_recipe):
    method = make_recipe(method={"class_weights": {"disc": 4}}).method
    with pytest.raises(ValueError, match=r"the data have no class 'disc'; \(0 classes: \)"):
        weights_by_class(method, (), 3)
