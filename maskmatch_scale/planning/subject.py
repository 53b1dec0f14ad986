"""What is planned: a recipe and its models, on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from maskmatch_scale.models import Segmenter
from maskmatch_scale.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Subject:
    """A recipe with its precision chosen, and its models without weights."""

    recipe: Recipe
    """`engine.precision` is no longer `auto`."""
    student: Segmenter
    """On the meta device, frozen as `optim.freeze` says."""
    frozen_teacher: Segmenter | None
    """`method.teacher`, on the meta device; None: the average of the student labels."""
    labelled_images: int
    """In a micro-batch of a rank; 0 if the run has no labels."""
    unlabelled_images: int
    """In a micro-batch of a rank, after the burn-in."""
    device: Literal["cuda", "cpu"] = "cuda"
    """On what the ranks run: sizes of chunks and what autocast does depend on it."""
    like: Segmenter | None = None
    """A model that differs from the student at most in activation checkpointing, the same one for all settings that are
    compared: passes without gradients are traced once for it. None: the student itself."""
