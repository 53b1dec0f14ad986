"""Sections of a recipe that say what is learned, and how: the method and the optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from maskmatch_scale.recipe.bases import BASES, has_unlabelled_loss
from maskmatch_scale.recipe.by_class import DEFAULT_THRESHOLD, check_thresholds, check_weights
from maskmatch_scale.recipe.section import Section
from maskmatch_scale.recipe.tables import OneOf
from maskmatch_scale.recipe.values import Frozen, Positive, Probability, ScaleRange


class MaskRecipe(Section):
    """The masked-modelling task: predict the segmentation from some units only."""

    keep: Annotated[float, Field(gt=0, le=1)] | None = 0.3
    """Share of units the student sees; null turns the masked loss off."""
    complement: bool = False
    """Whether the student sees a second masked view in the same forward pass: as many units, drawn from those that the
    first one masks. With `method.mask.keep` 0.5 and an even number of units that is the rest of the image. The masked
    loss is the mean over both. Needs a `keep` of at most 0.5."""
    mode: Literal["drop", "zero"] = "drop"
    """drop: masked units are not computed. zero: pixels of masked units are set to zero, as in MIC, which saves no
    computation."""
    view: Literal["weak", "strong"] = "weak"
    """View that is masked."""
    pixels: Literal["all", "masked", "visible"] = "all"
    """Pixels over which the masked loss is taken: all, those of masked units, or those of visible units."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """λ_m: weight of the masked loss."""


class StrongViewRecipe(Section):
    """Photometric strong view, drawn for each image by itself. A strength of 0 switches an operation off."""

    brightness: Annotated[float, Field(ge=0)] = 0.5
    """Factor drawn from [max(0, 1-b), 1+b]."""
    contrast: Annotated[float, Field(ge=0)] = 0.5
    """Factor drawn from [max(0, 1-c), 1+c], around the image's own mean grey."""
    saturation: Annotated[float, Field(ge=0)] = 0.5
    """Factor drawn from [max(0, 1-s), 1+s]."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.25
    """Shift drawn from [-h, h], in turns of the colour circle."""
    jitter_probability: Probability = 0.8
    """Share of images whose colours are jittered."""
    grey_probability: Probability = 0.2
    """Share of images turned grey."""
    blur_sigma_px: ScaleRange = (0.1, 2.0)
    """Gaussian blur: range of the standard deviation, in px."""
    blur_probability: Probability = 0.5
    """Share of images blurred."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """Gaussian noise: its standard deviation is drawn from 0 to this number, for pixel values 0–1."""
    cutmix_probability: Probability = 0.5
    """CutMix: share of images that get a box of their neighbour in the global batch."""
    cutmix_area: ScaleRange = (0.02, 0.4)
    """CutMix: range of the box's area, as a share of the image."""
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of units that the student sees of each of the base's views, also of a weak one (unimatch). The others are
    not computed; the loss is taken on all pixels all the same, with features of masked units from the context decoder.
    BatchNorm's running statistics then come from labelled images alone. null = whole views. A masked view
    (`method.mask`) has units of its own."""


class MethodRecipe(Section):
    """MaskMatch: a weak-to-strong base, with masks and a multi-scale ensemble on top."""

    base: Annotated[str, BeforeValidator(OneOf(BASES))] = "fixmatch"
    """Weak-to-strong base: what is learnt on whole unlabelled images (docs/method.md#bases)."""
    views_of: Literal["unlabelled", "labelled"] = "unlabelled"
    """Images that the base's views and masked views are made of. labelled: the labelled images, with their own labels
    in place of the teacher's; no unlabelled image is read. It is for ablations: what do views bring by themselves?"""
    # Decision: docs/decisions/0062-frozen-teacher.md.
    teacher: Annotated[str, Field(min_length=1)] = "ema"
    """What labels the unlabelled images. ema: the average of the student. A path: a trained segmenter of the same
    classes, larger or of another backbone if you like, with its weights frozen: a run (its newest checkpoint), a
    checkpoint in one, or an export. The average is still what is evaluated and exported. Every rank holds this teacher
    whole, 4 bytes a parameter, at every ZeRO stage (docs/fine_tuning.md). It is not opened where nothing looks at
    unlabelled images."""
    teacher_margin_px: Annotated[int, Field(ge=0)] = 0
    """How many px around the student's crop, on each side, the teacher sees too when it labels; only labels of the crop
    are used. Where the image ends the margin is padding, as a crop is. The student's crops do not depend on it."""
    mask: MaskRecipe = MaskRecipe()
    scales: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.5, 1.0, 1.5)
    """Q: scales at which the teacher predicts an image; the mean of these predictions gives the pseudo-labels. [1.0]
    switches the ensemble off."""
    # Decision: docs/decisions/0057-values-by-class-name.md.
    threshold: Annotated[Probability | dict[str, float], BeforeValidator(check_thresholds)] = DEFAULT_THRESHOLD
    """τ: a pixel's pseudo-label counts where the teacher's confidence is at least this. A mapping of class names gives
    each pseudo-label the τ of its class; `default` is that of classes which are not named, 0.95 if left out."""
    unlabelled_weight: Annotated[float, Field(ge=0)] = 1.0
    """λ_u: weight of the base's unlabelled loss."""
    # Decision: docs/decisions/0009-burn-in-as-a-share.md.
    burn_in: Probability = 0.0
    """Share of the run, at its start, that trains with the labelled loss alone; no unlabelled sample is read or
    computed in it."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.996
    """α: largest decay of the teacher's moving average; the decay at step t is min(1 - 1/(t+1), α)."""
    ema_buffers: Literal["average", "copy"] = "average"
    """Floating-point buffers of the teacher (BatchNorm's running statistics). average: averaged like weights. copy:
    copied from the student."""
    class_weights: Annotated[Literal["none", "inverse_sqrt"] | dict[str, float], BeforeValidator(check_weights)] = (
        "none"
    )
    """Weights of the classes in the labelled loss. inverse_sqrt: (the class's share of the pixels of the drawn labelled
    samples)^-1/2, scaled to mean 1 over pixels. A mapping of class names: these weights, ≥ 0, and 1 for classes that
    are not named. The loss is divided by the sum of the weights of its pixels, so only their ratios matter."""
    strong_view: StrongViewRecipe = StrongViewRecipe()

    @property
    def base_keep(self) -> float | None:
        """`strong_view.keep`; None for a base that has no views."""
        return self.strong_view.keep if has_unlabelled_loss(self.base) else None

    @property
    def dropped(self) -> dict[str, float]:
        """Losses on views whose masked units are not computed, and the share of units that the student sees of them."""
        keeps = {"loss_u": self.base_keep, "loss_m": self.mask.keep if self.mask.mode == "drop" else None}
        return {loss: keep for loss, keep in keeps.items() if keep is not None}

    @property
    def frozen_teacher(self) -> str | None:
        """The path in `teacher`; None: the average of the student labels."""
        return None if self.teacher == "ema" else self.teacher


class OptimRecipe(Section):
    """AdamW and its schedule. No decay on biases, norms and other one-dimensional parameters."""

    lr: Positive = 1e-4
    """Peak learning rate."""
    lr_reference_batch: Annotated[int, Field(ge=1)] | None = None
    """Labelled images per step for which `optim.lr` was chosen. The rate is multiplied by (labelled images per step of
    this run) / (this number), the linear scaling rule. null = the rate is not scaled."""
    head_lr_multiplier: Positive = 1.0
    """Factor on `optim.lr` for the head and the context decoder."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """ViT only: each block's rate is this factor times the rate of the block after it (BEiT: 0.65 to 0.9). 1 = the same
    rate everywhere."""
    # Decision: docs/decisions/0056-frozen-parts.md.
    freeze: Frozen = None
    """What of the backbone is not trained. backbone: all of it. A number N: of a ViT the first N blocks with all that
    comes before them (patch and position embedding, class and register tokens); of a SegFormer the first N of its
    stages, each with its patch embedding and norm. A frozen part has no gradients, optimizer state or backward pass,
    and no dropout or stochastic depth (docs/fine_tuning.md). null = nothing is frozen."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's weight decay."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """AdamW's β₁ and β₂."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly to its peak."""
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    """How the learning rate falls to zero at the last step; constant = it does not fall."""
    poly_power: Positive = 0.9
    """Exponent of the schedule `poly`."""
    clip_norm: Positive | None = None
    """Largest norm of the whole gradient; a larger gradient is scaled down to it. null = never clipped."""


def uses_unlabelled(recipe: MethodRecipe) -> bool:
    """Whether any loss of the recipe looks at unlabelled images."""
    return makes_views(recipe) and recipe.views_of == "unlabelled"


def makes_views(recipe: MethodRecipe) -> bool:
    """Whether the recipe has a loss on views of the base or on masked views, be it of labelled images."""
    return has_unlabelled_loss(recipe.base) or recipe.mask.keep is not None
