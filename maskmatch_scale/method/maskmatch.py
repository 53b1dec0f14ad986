"""One step of MaskMatch: its views and its losses, in the order in which they are made.

step = maskmatch.prepare(batch)                  views and visible units are drawn
pixels = maskmatch.denominators(step)            the caller sums them over ranks and micro-batches
pseudo = maskmatch.pseudo_label(step, teacher)   the teacher labels the whole weak view; it may see more
for part in step.parts: loss, sum = maskmatch(part, step, pseudo, scale)     one forward pass, then its backward pass
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maskmatch_scale.data.batches.batch import Batch
from maskmatch_scale.method.bases import PseudoLabels, base_class, build_base
from maskmatch_scale.method.draws import Drawn, ViewDraws
from maskmatch_scale.method.losses import cross_entropy_sum, denominator
from maskmatch_scale.method.pseudo_labels import multi_scale_probabilities
from maskmatch_scale.method.views import Colours, Neighbour, Unlabelled, View
from maskmatch_scale.models.graphed import GraphedViews
from maskmatch_scale.models.segmenter import MaskMode, Segmenter
from maskmatch_scale.models.units import stack_units, unstack_units, visible_count, visible_pixel_mask
from maskmatch_scale.recipe import MaskRecipe, MethodRecipe
from maskmatch_scale.recipe.learning import makes_views

PARTS = ("loss_x", "loss_u", "loss_m")
"""The losses of a step. Every tensor of shape (3,) below has them in this order."""


@dataclass(frozen=True)
class MaskedView:
    """The view that the student sees in part, once, or twice with other units (`method.mask.complement`)."""

    view: View
    visible: Tensor
    """int64 (U, k), or (2 · U, k): visible units, sorted."""
    counted: Tensor
    """bool (U, h, w), or (2 · U, h, w): ω ∩ R, where the masked loss is taken."""


@dataclass(frozen=True)
class Step:
    """One micro-batch with every view drawn; nothing here needs a gradient."""

    labelled_images: Tensor
    """float (B, C, h, w), values 0–1; B is 0 in a run without labels."""
    labels: Tensor
    """int64 (B, h, w)."""
    labelled_pixels: Tensor
    """bool (B, h, w): pixels with a label."""
    unlabelled: Unlabelled | None
    """None during burn-in and in runs without a loss on views. (Labelled images with `method.views_of` labelled.)"""
    views: tuple[View, ...]
    """Of the base."""
    visible: Tensor | None
    """int64 (views · U, k): visible units of `views`, one view after the other; None: the student sees them whole."""
    masked: MaskedView | None
    guessed: frozenset[str]
    """Those of `PARTS` for which features of masked units are guessed by the context decoder."""
    with_margin: Tensor | None = None
    """uint8 (U, C, h + 2 m, w + 2 m): what the teacher sees; None: the weak view (`method.teacher_margin_px` is 0)."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The losses that are taken, one forward pass each. The last one reaches every parameter that any reaches.

        (Not all of them use the context decoder.)
        """
        there = (len(self.labelled_images) > 0, bool(self.views), self.masked is not None)
        parts = (part for part, is_there in zip(PARTS, there, strict=True) if is_there)
        return tuple(sorted(parts, key=lambda part: part in self.guessed))


class MaskMatch(nn.Module):
    """The student and the losses of one step (Pan et al., arXiv 2312.08631; details of our choice in docs/method.md).

    Args:
        segmenter: the student.
        recipe: the `method` section.
        seed: of the run.
        ignore_index: label value of pixels that do not count.
        class_weight: float (classes,) weights of the labelled loss, or None.
        threshold: float64 (classes,): τ of each class, on the device of the labels; None: `recipe.threshold`.
        batchnorm_frozen: whether BatchNorm uses its running statistics, unchanged, in training too.
        neighbour: the rank beside this one, which CutMix asks for the partner of an odd image; None if there is none.
    """

    mean: Tensor
    std: Tensor
    class_weight: Tensor | None
    part_weights: Tensor

    def __init__(
        self,
        segmenter: Segmenter,
        recipe: MethodRecipe,
        seed: int,
        ignore_index: int,
        class_weight: Tensor | None = None,
        *,
        threshold: Tensor | None = None,
        batchnorm_frozen: bool = False,
        neighbour: Neighbour | None = None,
    ) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.recipe = recipe
        self.seed = seed
        self.ignore_index = ignore_index
        for_all = recipe.threshold
        assert threshold is not None or isinstance(for_all, float), "τ by class needs the names of the classes"
        # No buffer: an engine with 16-bit weights would round it.
        self.threshold: Any = for_all if threshold is None else threshold
        self.batchnorm_frozen = batchnorm_frozen
        self.neighbour = neighbour
        self.graphs: GraphedViews | None = None
        """Runs the student on views that are not perturbed in place of its own forward."""
        self.base = build_base(recipe.base)
        self.strong_views = strong_views_of(recipe)
        self.colours = Colours(rgb=segmenter.sees_colours)
        weights = torch.tensor([1.0, recipe.unlabelled_weight, recipe.mask.weight], dtype=torch.float64)
        self.register_buffer("part_weights", weights, persistent=False)
        self.register_buffer("mean", torch.tensor(segmenter.mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(segmenter.std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("class_weight", class_weight, persistent=False)

    def train(self, mode: bool = True) -> MaskMatch:
        """As `nn.Module.train`, but frozen BatchNorm stays in eval mode."""
        super().train(mode)
        if self.batchnorm_frozen:
            for module in self.segmenter.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def normalise(self, images: Tensor) -> Tensor:
        """Values 0–1 to what the backbone expects, in the dtype of its weights (bf16 under a bf16 engine)."""
        return ((images - self.mean) / self.std).to(next(self.segmenter.parameters()).dtype)

    def prepare(self, batch: Batch) -> Step:
        """Draw every view of a micro-batch, on its device. Without unlabelled images (burn-in) there are no views."""
        unlabelled, masked, with_margin = None, None, None
        views: tuple[View, ...] = ()
        visible, guessed = None, frozenset[str]()
        images, labels = batch.labelled_images / 255, batch.labels.long()
        pixels = labels != self.ignore_index
        if makes_views(self.recipe) and batch.positions:
            weak = View(images, pixels, None)
            if self.recipe.views_of == "unlabelled":
                crop, margin = batch.unlabelled_images, self.recipe.teacher_margin_px
                if margin:
                    with_margin, crop = crop, crop[..., margin:-margin, margin:-margin]
                weak = View(crop / 255, batch.unlabelled_valid, None)
            size_px = (weak.images.shape[-2], weak.images.shape[-1])
            base_views, base_visible = _seen_in_part(self.segmenter, self.recipe, size_px)
            perturbs, twice = self.base.perturbs_features, self.recipe.mask.complement
            drawn = Drawn(batch.draws, self.strong_views, base_views, base_visible, perturbs, twice)
            unlabelled = Unlabelled(
                weak,
                batch.positions,
                drawn,
                self.recipe.strong_view,
                self.seed,
                self.colours,
                self.neighbour,
            )
            views = self.base.views(unlabelled)
            if base_views:
                visible = unlabelled.drawn.visible_of_base
            guessed = _guessing_losses(self.segmenter, self.recipe, size_px)
            if self.recipe.mask.keep is not None:
                masked = self._masked_view(unlabelled, self.recipe.mask)
        return Step(images, labels, pixels, unlabelled, views, visible, masked, guessed, with_margin)

    def _masked_view(self, unlabelled: Unlabelled, recipe: MaskRecipe) -> MaskedView:
        view = unlabelled.weak if recipe.view == "weak" else unlabelled.strong_view(0)
        visible = unlabelled.drawn.visible
        counted = _times(view.valid, 1 + recipe.complement)
        if recipe.pixels != "all":
            grid = self.segmenter.unit_grid(view.images.shape[-2], view.images.shape[-1])
            seen = visible_pixel_mask(visible, grid, self.segmenter.unit_px)
            counted = counted & (seen if recipe.pixels == "visible" else ~seen)
        return MaskedView(view, visible, counted)

    def denominators(self, step: Step) -> Tensor:
        """Pixels (weights for the labelled loss) that this micro-batch adds to each mean: float64 (3,)."""
        zero = torch.zeros((), dtype=torch.float64, device=step.labels.device)
        return torch.stack(
            [
                denominator(step.labels, step.labelled_pixels, self.class_weight),
                sum((view.valid.sum() for view in step.views), zero),
                step.masked.counted.sum() + zero if step.masked else zero,
            ]
        )

    @torch.no_grad()
    def pseudo_label(
        self,
        step: Step,
        teacher: Callable[[Tensor], Tensor],
        normalise: Callable[[Tensor], Tensor] | None = None,
    ) -> PseudoLabels | None:
        """ŷ and 1[c ≥ τ(ŷ)] of the weak view; None if the step has no use for them.

        Views of labelled images have their own labels, and count where there is one.

        Args:
            step: from :meth:`prepare`.
            teacher: normalised images (U, C, h + 2 m, w + 2 m) to logits, m = `method.teacher_margin_px`.
            normalise: images of values 0–1 to what the teacher expects; None: to what the student expects.
        """
        if step.unlabelled is None:
            return None
        if self.recipe.views_of == "labelled":
            pseudo = PseudoLabels(step.labels, step.labelled_pixels)
        else:
            seen = step.unlabelled.weak.images if step.with_margin is None else step.with_margin / 255
            pseudo = self._taught(teacher, (normalise or self.normalise)(seen))
        for view in (*step.views, *([step.masked.view] if step.masked else [])):
            # Now and not in the forward pass: mixing may exchange with another rank, and an engine's forward must not.
            pseudo.mixed(view.cutmix)
        return pseudo

    def _taught(self, teacher: Callable[[Tensor], Tensor], images: Tensor) -> PseudoLabels:
        margin = self.recipe.teacher_margin_px
        probabilities = multi_scale_probabilities(teacher, images, self.recipe.scales, margin)
        labels, confidence = probabilities.labels()
        threshold = self.threshold
        if isinstance(threshold, Tensor):
            threshold = threshold.to(confidence.dtype)[labels]
        kept = probabilities if self.base.needs_probabilities else None
        return PseudoLabels(labels, confidence >= threshold, kept)

    def forward(self, part: str, step: Step, pseudo: PseudoLabels | None, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The student's forward pass for one loss.

        Args:
            part: one of `Step.parts`.
            step: from :meth:`prepare`.
            pseudo: from :meth:`pseudo_label`.
            scale: float64 (3,): factor on each part's sum over pixels. The caller gives one over the global
                denominator, times what undoes the engine's averaging over ranks.

        Returns:
            The loss to call backward on (scalar), and the part's sum over pixels, detached: float32 scalars.
        """
        if part == "loss_x":
            logits = self._logits(self.normalise(step.labelled_images))
            total = cross_entropy_sum(logits, step.labels, step.labelled_pixels, self.class_weight)
        else:
            assert pseudo is not None
            total = self._unlabelled_loss_sum(step, pseudo) if part == "loss_u" else self._masked_loss_sum(step, pseudo)
        index = PARTS.index(part)
        return total * (scale[index] * self.part_weights[index]).to(total.dtype), total.detach()

    def _unlabelled_loss_sum(self, step: Step, pseudo: PseudoLabels) -> Tensor:
        """The base's loss. Its views run in one forward pass: they have one shape, and the loss may compare them."""
        unlabelled, visible = step.unlabelled, step.visible
        assert unlabelled is not None
        sizes = [len(view.images) for view in step.views]

        def perturb(features: list[Tensor]) -> list[Tensor]:
            maps = features if visible is None else [stack_units(level) for level in features]
            views = zip(*(torch.split(level, sizes) for level in maps), strict=True)
            perturbed = self.base.perturb([list(levels) for levels in views], unlabelled)
            maps = [torch.cat(parts) for parts in zip(*perturbed, strict=True)]
            return maps if visible is None else [unstack_units(level) for level in maps]

        images = self.normalise(torch.cat([view.images for view in step.views]))
        if self.base.perturbs_features:
            logits: Tensor = self.segmenter(images, visible, perturb=perturb)
        else:
            logits = self._logits(images, visible)
        return self.base.loss_sum(torch.split(logits, sizes), step.views, pseudo)

    def _logits(self, images: Tensor, visible: Tensor | None = None, mode: MaskMode = "drop") -> Tensor:
        """The student on normalised images, see `Segmenter.forward`."""
        if self.graphs is not None:
            return self.graphs(images, visible, mode)
        logits: Tensor = self.segmenter(images, visible, mode)
        return logits

    def _masked_loss_sum(self, step: Step, pseudo: PseudoLabels) -> Tensor:
        """Σ over ω ∩ R of 1[c ≥ τ] CE(S(u_m, visible = V), ŷ)."""
        masked = step.masked
        assert masked is not None
        target, times = pseudo.mixed(masked.view.cutmix), 1 + self.recipe.mask.complement
        images = _times(self.normalise(masked.view.images), times)
        logits = self._logits(images, masked.visible, self.recipe.mask.mode)
        return cross_entropy_sum(logits, _times(target.labels, times), _times(target.confident, times) & masked.counted)


def _times(tensor: Tensor, times: int) -> Tensor:
    """(U, …) so often, one after the other: (times · U, …)."""
    return torch.cat([tensor] * times) if times > 1 else tensor


def view_draws(segmenter: Segmenter, recipe: MethodRecipe, seed: int, size_px: Sequence[int]) -> ViewDraws:
    """What has to be drawn for unlabelled images.

    Args:
        segmenter: the student; it knows the units of an image.
        recipe: the `method` section.
        seed: of the run.
        size_px: (h, w) of the images.
    """
    height, width = size_px
    keep, base = recipe.mask.keep, _seen_in_part(segmenter, recipe, size_px)
    grid = segmenter.unit_grid(height, width) if keep is not None or base[0] else None
    visible = visible_count(grid, keep) if grid is not None and keep is not None else 0
    perturbs, twice = base_class(recipe.base).perturbs_features, recipe.mask.complement
    size, strong = (height, width), strong_views_of(recipe)
    return ViewDraws(recipe.strong_view, seed, strong, size, grid, visible, *base, perturbs, twice)


def _seen_in_part(segmenter: Segmenter, recipe: MethodRecipe, size_px: Sequence[int]) -> tuple[int, int]:
    """How many views of the base the student sees in part, and how many units of each; (0, 0): it sees them whole."""
    if recipe.base_keep is None:
        return 0, 0
    views = base_class(recipe.base).trained_views
    return views, visible_count(segmenter.unit_grid(*size_px), recipe.base_keep)


def _guessing_losses(segmenter: Segmenter, recipe: MethodRecipe, size_px: Sequence[int]) -> frozenset[str]:
    """Those of `PARTS` for which features of masked units are guessed: nothing else uses the context decoder."""
    if not recipe.dropped:
        return frozenset()
    rows, cols = grid = segmenter.unit_grid(*size_px)
    return frozenset(loss for loss, keep in recipe.dropped.items() if visible_count(grid, keep) < rows * cols)


def strong_views_of(recipe: MethodRecipe) -> int:
    """How many strong views of an image are drawn: those of the base, and the one that is masked if it is strong."""
    masked_strong = recipe.mask.keep is not None and recipe.mask.view == "strong"
    return max(base_class(recipe.base).strong_views, int(masked_strong))


def class_weights(pixels: Tensor) -> Tensor:
    """`method.class_weights: inverse_sqrt`: (share of pixels)^-1/2, scaled so that its mean over pixels is 1.

    Args:
        pixels: int64 (classes,) pixel counts; a class without pixels gets weight 0, since no loss is taken on it.

    Returns:
        float32 (classes,).
    """
    share = pixels.double() / pixels.sum()
    weight = torch.where(share > 0, share.clamp(min=torch.finfo(torch.float64).tiny).rsqrt(), share)
    return (weight / (share * weight).sum()).float()
