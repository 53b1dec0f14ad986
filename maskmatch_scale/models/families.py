"""The backbone families that there are, and the questions that a backbone's name answers.

To add a family: write its module, and add it to `FAMILIES`. `models/backbone.py` says what it must define.

Decision: docs/decisions/0031-capabilities-asked-of-the-family.md.
"""

from __future__ import annotations

from maskmatch_scale.models.backbone import Family
from maskmatch_scale.models.segformer import SegformerFamily
from maskmatch_scale.models.vit import VitFamily

FAMILIES: list[Family] = [VitFamily(), SegformerFamily()]


def family_of(backbone: str) -> Family:
    """The family that a backbone's full name belongs to, for example `timm/vit_small_patch16_224`.

    Raises:
        ValueError: no family takes such a name; the message lists the names that there are.
    """
    for family in FAMILIES:
        if backbone.startswith(family.prefix) and backbone != family.prefix:
            return family
    *first, last = [name for family in FAMILIES for name in family.accepted]
    raise ValueError(f"backbone: {backbone!r} is neither {', '.join(first)} nor {last}")


def check_capabilities(backbone: str, *, compile_blocks: bool, layer_decay: float) -> None:
    """Refuse what a backbone's family cannot do, by the recipe's keys.

    Args:
        backbone: `model.backbone`.
        compile_blocks: `engine.compile`.
        layer_decay: `optim.layer_decay`; 1: not asked for.

    Raises:
        ValueError: the family cannot do it, or there is no such family; names the key and what to do.
    """
    family = family_of(backbone)
    if compile_blocks and not family.compiles_blocks:
        raise ValueError(
            f"model.backbone={backbone} with engine.compile=true: {only_these_compile()}; set engine.compile=false"
        )
    if layer_decay < 1 and not family.numbers_layers:
        raise ValueError(
            f"optim.layer_decay={layer_decay} with model.backbone={backbone}: {only_these_number_layers()}; "
            "set optim.layer_decay=1"
        )


def only_these_compile() -> str:
    """The part of a message that says whose blocks can be compiled."""
    titles = (f"a {family.title}" for family in FAMILIES if family.compiles_blocks)
    return f"only the blocks of {' or '.join(titles)} are compiled"


def only_these_number_layers() -> str:
    """The part of a message that says for which backbones layer-wise decay of the learning rate is defined."""
    titles = (f"a {family.title}'s" for family in FAMILIES if family.numbers_layers)
    return f"it is defined for {' or '.join(titles)} blocks"
