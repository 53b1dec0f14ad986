"""The weak-to-strong bases that `method.base` may name.

This table is all that the rooms below and beside `method` know of a base. To add one: write `method/bases/NAME.py`,
and add a line to `BASES`. What a base must define is in `method/bases/__init__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseInfo:
    """What is known of a base without importing it."""

    title: str
    """Its name in tables and reports."""
    implementation: str
    """`module:class`. A string, because this room imports no method."""
    unlabelled_loss: bool = True
    """Whether it has a loss on unlabelled images, besides that of masked views."""
    masked_title: str | None = None
    """Its name together with masked views; None: its title and "+ mask"."""


SUPERVISED = "supervised"
"""The base without a loss on unlabelled images."""

BASES: dict[str, BaseInfo] = {
    SUPERVISED: BaseInfo("supervised", "maskmatch_scale.method.bases.supervised:Supervised", unlabelled_loss=False),
    "fixmatch": BaseInfo("FixMatch", "maskmatch_scale.method.bases.fixmatch:FixMatch", masked_title="MaskMatch"),
}


def title_of(base: str, *, masked: bool) -> str:
    """The name of a method in tables and reports; a base that is not in the table is called as it calls itself.

    Args:
        base: `method.base` of a recipe, which may be of another version of this package.
        masked: whether the recipe has masked views.
    """
    info = BASES.get(base)
    title = info.title if info else base
    if not masked:
        return title
    return info.masked_title if info and info.masked_title else f"{title} + mask"


def has_unlabelled_loss(base: str) -> bool:
    """Whether a base has a loss on unlabelled images; one that is not in the table is taken to have it."""
    return base not in BASES or BASES[base].unlabelled_loss
