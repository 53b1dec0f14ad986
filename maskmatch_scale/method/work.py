"""What one step asks of the backbone: tokens that the student is trained on, and floating-point operations.

Counted by the architecture (`models/cost.py`), so that two implementations of one step have the same count. It is the
numerator of MFU, the share of a device's peak that a run uses; docs/watching.md says what is left out.

Decision: docs/decisions/0040-mfu-counts-the-backbone.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maskmatch_scale.method.bases import base_class
from maskmatch_scale.models.cost import encoder_macs, encoder_tokens, encoder_train_macs
from maskmatch_scale.models.resample import resized_px
from maskmatch_scale.models.segmenter import Segmenter
from maskmatch_scale.models.units import visible_count
from maskmatch_scale.recipe import MethodRecipe


@dataclass(frozen=True)
class Work:
    """What a step, or a part of it, asks of the backbone."""

    tokens: int = 0
    """Tokens of the finest level that the student sees, in all its views; of a masked view, those of visible units."""
    flops: int = 0
    """Floating-point operations: two for each multiply–add."""

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.flops + other.flops)


def step_work(
    segmenter: Segmenter,
    recipe: MethodRecipe,
    size_px: Sequence[int],
    labelled: int,
    unlabelled: int,
    *,
    teacher: Segmenter | None = None,
) -> Work:
    """The work of one step: forward and backward of the student on all views, forward of the teacher at all scales.

    Of a base all views are counted that the student is trained on. Nothing is counted for recomputing activations.

    Args:
        segmenter: the student, whole: shapes of its weights are read (on the meta device too).
        recipe: the `method` section.
        size_px: (h, w) of what the student sees; whole units if units are dropped.
        labelled: labelled images of the step.
        unlabelled: images of the step that views are made of; 0 in the burn-in.
        teacher: a frozen one; None: an average of the student.
    """
    work = _trained(segmenter, size_px, labelled)
    if not unlabelled:
        return work
    views = base_class(recipe.base).trained_views
    visible = {loss: visible_count(segmenter.unit_grid(*size_px), keep) for loss, keep in recipe.dropped.items()}
    work += _trained(segmenter, size_px, views * unlabelled, visible.get("loss_u"))
    if recipe.mask.keep is not None:
        work += _trained(segmenter, size_px, (1 + recipe.mask.complement) * unlabelled, visible.get("loss_m"))
    if recipe.views_of == "labelled":  # the teacher labels nothing
        return work
    teacher = teacher or segmenter
    seen = [side + 2 * recipe.teacher_margin_px for side in size_px]
    sizes = [resized_px(seen, scale, teacher.patch_px) for scale in recipe.scales]
    return work + Work(flops=2 * unlabelled * sum(encoder_macs(teacher, *size) for size in sizes))


def _trained(segmenter: Segmenter, size_px: Sequence[int], images: int, visible: int | None = None) -> Work:
    height, width = size_px
    return Work(
        images * encoder_tokens(segmenter, height, width, visible),
        2 * images * encoder_train_macs(segmenter, height, width, visible),
    )
