"""The table of weak-to-strong bases that `method.base` may name.

Packages other than `method` know bases only by this table. To add a base, write `method/bases/NAME.py` and add a line
to `BASES`. `method/bases/__init__.py` says what a base must define.

Decision: docs/decisions/0032-table-of-bases-in-recipe.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseInfo:
    """What is known about a base without importing it."""

    title: str
    """Its name in tables and reports."""
    implementation: str
    """`module:class`. It is a string, because `recipe` may not import `method`."""
    unlabelled_loss: bool = True
    """Whether it has a loss on unlabelled images, besides that of masked views."""
    masked_title: str | None = None
    """Its name when it is combined with masked views; None: its title and "+ mask"."""


SUPERVISED = "supervised"
"""The base without a loss on unlabelled images."""

BASES: dict[str, BaseInfo] = {
    SUPERVISED: BaseInfo("supervised", "maskmatch_scale.method.bases.supervised:Supervised", unlabelled_loss=False),
    "mean_teacher": BaseInfo("Mean Teacher", "maskmatch_scale.method.bases.mean_teacher:MeanTeacher"),
    "fixmatch": BaseInfo("FixMatch", "maskmatch_scale.method.bases.fixmatch:FixMatch", masked_title="MaskMatch"),
    "unimatch": BaseInfo("UniMatch", "maskmatch_scale.method.bases.unimatch:UniMatch"),
    "unimatch_v2": BaseInfo("UniMatch V2", "maskmatch_scale.method.bases.unimatch_v2:UniMatchV2"),
}


def title_of(base: str, *, masked: bool) -> str:
    """The name of a method in tables and reports. A base that is not in the table keeps the name from its recipe.

    Args:
        base: `method.base` of a recipe, which another version of this package may have written.
        masked: whether the recipe has masked views.
    """
    info = BASES.get(base)
    title = info.title if info else base
    if not masked:
        return title
    return info.masked_title if info and info.masked_title else f"{title} + mask"


def has_unlabelled_loss(base: str) -> bool:
    """Whether a base has a loss on unlabelled images; True for a base that is not in the table."""
    return base not in BASES or BASES[base].unlabelled_loss
