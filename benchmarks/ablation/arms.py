"""The arms: keys of the recipe that differ from the task's, by name.

Every base of `recipe/bases.py` has four arms of its own: alone, with the mask, with the ensemble, and with both. The
others change one thing of FixMatch or of MaskMatch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe.bases import BASES, SUPERVISED, title_of

Overrides = Mapping[str, Any]
"""Values by dotted key."""

ONE_SCALE: Overrides = {"method.scales": [1.0]}
ENSEMBLE: Overrides = {"method.scales": [0.5, 1.0, 1.5]}
NO_MASK: Overrides = {"method.mask.keep": None}
"""Where it is not said, the task's own keep ratio holds."""
MASKED_NAMES = {SUPERVISED: "masked_only", "fixmatch": "maskmatch"}
"""Names of bases with the mask; others are called `BASE_mask`."""


@dataclass(frozen=True)
class Arm:
    """One recipe of the grid."""

    title: str
    """In tables and plots."""
    overrides: Overrides
    group: str
    """What kind of question it answers."""
    variant: str | None = None
    """Of `variants.VARIANTS`: behaviour that has no key."""

    @property
    def settings(self) -> list[str]:
        """The overrides as `section.key=value`."""
        return [f"{key}={json.dumps(value)}" for key, value in self.overrides.items()]


def _of_bases() -> Iterator[tuple[str, Arm]]:
    """Each base alone, with the mask, with the ensemble, with both; without labels to ensemble, alone and masked."""
    for base, info in BASES.items():
        for masked, ensemble in ((False, False), (True, False), (False, True), (True, True)):
            if ensemble and not masked and not info.unlabelled_loss:
                continue  # the teacher's labels are used nowhere
            name = MASKED_NAMES.get(base, f"{base}_mask") if masked else base
            title = title_of(base, masked=masked)
            keys = {"method.base": base, **({} if masked else NO_MASK), **(ENSEMBLE if ensemble else ONE_SCALE)}
            if ensemble:
                name, title = f"{name}_ensemble", f"{title} + ensemble"
            yield name, Arm(title, keys, "bases")


FIXMATCH: Overrides = {"method.base": "fixmatch", **NO_MASK, **ONE_SCALE}
MASKMATCH: Overrides = {"method.base": "fixmatch", **ONE_SCALE}
ON_BOTH: dict[str, tuple[str, str, Sequence[float]]] = {
    "threshold": ("τ", "method.threshold", (0.8, 0.9, 0.95)),
    "ema": ("EMA", "method.ema_decay", (0.99, 0.996, 0.999)),
    "burn_in": ("burn-in", "method.burn_in", (0.0, 0.25, 0.5)),
}
"""Keys that are changed with and without the mask."""


def _of_details() -> Iterator[tuple[str, Arm]]:
    def masked(title: str, **keys: Any) -> Arm:
        changed = {f"method.mask.{key}": value for key, value in keys.items()}
        return Arm(f"MaskMatch, {title}", {**MASKMATCH, **changed}, "mask")

    yield "mask_zero", masked("masked units painted", mode="zero")
    yield "mask_strong", masked("mask of the strong view", view="strong")
    for pixels in ("masked", "visible"):
        yield f"mask_pixels_{pixels}", masked(f"loss on {pixels} pixels", pixels=pixels)
    for keep in (0.1, 0.3, 0.5, 0.7, 0.9):
        yield f"mask_keep_{keep:g}", masked(f"keep {keep:g}", keep=keep)
    for keep in (0.3, 0.4, 0.5, 0.7):
        keys = {**FIXMATCH, "method.strong_view.keep": keep}
        yield f"strong_keep_{keep:g}", Arm(f"FixMatch, strong view at keep {keep:g}", keys, "cheap step")
    cheap = {**FIXMATCH, "method.strong_view.keep": 0.3}
    named = (
        ("fixmatch", "FixMatch", FIXMATCH),
        ("maskmatch", "MaskMatch", MASKMATCH),
        ("strong_keep_0.3", "FixMatch, strong view at keep 0.3", cheap),
    )
    for margin_px in (32, 84):  # whole patches of a SegFormer or ViT/16, and of a ViT/14
        for base, title, own in named:
            keys = {**own, "method.teacher_margin_px": margin_px}
            yield f"{base}_margin_{margin_px}", Arm(f"{title}, teacher sees {margin_px} px around", keys, "margin")
    both = {**MASKMATCH, "method.mask.keep": 0.5, "method.mask.complement": True}
    yield "masks_complement", Arm("MaskMatch, two complementary masks of keep 0.5", both, "mask")
    of_labelled = {"method.views_of": "labelled"}
    strong, masked_views = {**FIXMATCH, **of_labelled}, {**MASKMATCH, "method.base": SUPERVISED, **of_labelled}
    yield "labelled_strong", Arm("strong views and CutMix of labelled images", strong, "labelled only")
    yield "labelled_masks", Arm("masks of labelled images", masked_views, "labelled only")
    no_cutmix = {**FIXMATCH, "method.strong_view.cutmix_probability": 0.0}
    yield "fixmatch_no_cutmix", Arm("FixMatch, no CutMix", no_cutmix, "views")
    for name, (word, key, values) in ON_BOTH.items():
        for value in values:
            for base, title, own in (("fixmatch", "FixMatch", FIXMATCH), ("maskmatch", "MaskMatch", MASKMATCH)):
                yield f"{base}_{name}_{value:g}", Arm(f"{title}, {word} {value:g}", {**own, key: value}, name)
    for unit_px in (8, 14, 32, 42, 56):  # those that the task's patches and crop allow
        yield (
            f"unit_{unit_px}",
            Arm(f"MaskMatch, units of {unit_px} px", {**MASKMATCH, "model.unit_px": unit_px}, "mask"),
        )
    for weight in (0.5, 2.0):
        yield f"mask_weight_{weight:g}", masked(f"λ_m {weight:g}", weight=weight)
        keys = {**FIXMATCH, "method.unlabelled_weight": weight}
        yield f"fixmatch_weight_{weight:g}", Arm(f"FixMatch, λ_u {weight:g}", keys, "weights")
    every = {"method.base": SUPERVISED, **NO_MASK, **ONE_SCALE, "data.labelled_count": None}
    yield "all_labels", Arm("supervised, all labels", every, "bound")


def _of_variants() -> Iterator[tuple[str, Arm]]:
    fixmatch, maskmatch = ("fixmatch", "FixMatch", FIXMATCH), ("maskmatch", "MaskMatch", MASKMATCH)
    dropped = ("strong_keep_0.3", "FixMatch, strong view at keep 0.3", {**FIXMATCH, "method.strong_view.keep": 0.3})
    in_turn = ("maskmatch", "MaskMatch", {**MASKMATCH, **ENSEMBLE})
    for variant, words, bases in (
        ("lambda_ramp", "λ ramped", (fixmatch, maskmatch)),
        ("threshold_ramp", "τ rising from 0.5", (fixmatch, maskmatch)),
        ("threshold_down", "τ falling from 0.99", (fixmatch, maskmatch)),
        ("threshold_by_class", "τ by class", (fixmatch, maskmatch)),
        ("threshold_freematch", "τ as FreeMatch", (fixmatch, maskmatch)),
        ("soft_labels", "soft labels", (fixmatch,)),
        ("context_off", "no context decoder", (maskmatch, dropped)),
        ("labels_twice", "labels used twice", (dropped,)),
        ("scales_in_turn", "scales in turn", (in_turn,)),
    ):
        for base, title, keys in bases:
            yield f"{base}_{variant}", Arm(f"{title}, {words}", keys, "variants", variant)


ARMS: dict[str, Arm] = dict([*_of_bases(), *_of_details(), *_of_variants()])
"""All arms by name."""


def arms_of(names: Sequence[str], option: str = "--arms") -> dict[str, Arm]:
    """The arms of these names, which an option of the command line gives, each once, in this order.

    Raises:
        UserError: one is unknown; names the nearest, and all.
    """
    for name in names:
        if name not in ARMS:
            near = difflib.get_close_matches(name, ARMS, 3, 0.4)
            meant = f" did you mean {' or '.join(near)}?" if near else ""
            raise UserError(f"{option}: there is no arm {name!r};{meant} There are: {', '.join(ARMS)}")
    return {name: ARMS[name] for name in dict.fromkeys(names)}
