"""Keys whose values go by the names of classes: `method.class_weights` and `method.threshold`.

Decision: docs/decisions/0057-values-by-class-name.md.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from maskmatch_scale.recipe.learning import MethodRecipe

DEFAULT = "default"
"""In `method.threshold`: the classes that are not named."""
DEFAULT_THRESHOLD = 0.95


def check_weights(value: object) -> object:
    """Give a value of `method.class_weights` back.

    Raises:
        ValueError: it is neither a word that the key knows nor a mapping to weights.
    """
    words = ("none", "inverse_sqrt")
    if value in words:
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"it must be {', '.join(words)}, or a mapping of class names to weights")
    for name, weight in value.items():
        if not 0 <= _number(weight) < math.inf:
            raise ValueError(f"the weight of {name} is {weight!r}; it must be a number ≥ 0")
    return value


def check_thresholds(value: object) -> object:
    """Give a value of `method.threshold` back.

    Raises:
        ValueError: it is neither a share nor a mapping to shares.
    """
    values = value if isinstance(value, Mapping) else {"": value}
    for name, share in values.items():
        if not 0 <= _number(share) <= 1:
            where = f"that of {name} is {share!r}; it" if name else "it"
            raise ValueError(
                f"{where} must be a number from 0 to 1" + ("" if name else ", or a mapping of class names")
            )
    return value


def _number(value: object) -> float:
    """NaN for what is no number; no comparison with it is true."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def weights_by_class(recipe: MethodRecipe, classes: Sequence[str], count: int) -> tuple[float, ...] | None:
    """The weights in the mapping `method.class_weights`, one for each class; None if it is a word.

    Args:
        recipe: section method.
        classes: names, of the data.
        count: classes of the model. Those without a name are not in the labels.

    Raises:
        ValueError: a class is unknown; names the key and the nearest class.
    """
    if isinstance(recipe.class_weights, str):
        return None
    return _by_class("method.class_weights", recipe.class_weights, classes, count, 1.0)


def thresholds_by_class(recipe: MethodRecipe, classes: Sequence[str], count: int) -> float | tuple[float, ...]:
    """τ by `method.threshold`: one number for all classes, or one for each.

    Arguments and errors as for :func:`weights_by_class`.
    """
    if isinstance(recipe.threshold, float):
        return recipe.threshold
    named = dict(recipe.threshold)
    return _by_class("method.threshold", named, classes, count, named.pop(DEFAULT, DEFAULT_THRESHOLD))


def _by_class(
    key: str, named: Mapping[str, float], classes: Sequence[str], count: int, others: float
) -> tuple[float, ...]:
    for name in named:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, 1, 0.0)
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"{key}: the data have no class {name!r}; {meant}"
                f"({len(classes)} classes: {', '.join(classes[:20])}{', …' if len(classes) > 20 else ''})"
            )
    return tuple(named.get(name, others) for name in [*classes, *[""] * (count - len(classes))])
