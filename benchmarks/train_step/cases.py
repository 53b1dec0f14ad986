"""One backbone with both steps, ours and the straightforward one, part by part."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.train_step.straightforward import Straightforward, up
from maskmatch_scale.data.batches.batch import Batch
from maskmatch_scale.engine.precision import autocast
from maskmatch_scale.method.bases import PseudoLabels
from maskmatch_scale.method.maskmatch import MaskMatch, Step, view_draws
from maskmatch_scale.method.work import Work, step_work
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.models.cost import encoder_macs, encoder_train_macs
from maskmatch_scale.models.graphed import GraphedViews
from maskmatch_scale.models.units import visible_count, zero_masked_pixels
from maskmatch_scale.recipe import MaskRecipe, MethodRecipe

SCALES = (0.5, 1.0, 1.5)
PRECISIONS = {"fp32": None, "autocast-bf16": torch.bfloat16}
"""`engine.precision` of a step with fp32 weights: the type in which they are multiplied; None: in their own."""


@dataclass
class Case:
    """One backbone; both steps start from the same weights and see the same views."""

    backbone: str
    image_size: int
    classes: int
    images: int
    keep: float
    device: torch.device
    precision: str = "fp32"

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        size = self.image_size
        self.segmenter = build_segmenter(self.backbone, self.classes, image_size=size)
        self.plain = Straightforward(self.segmenter, self.backbone, size).to(self.device).train()
        self.segmenter.to(self.device)
        # Threshold 0: every pixel counts, whatever the confidence of random weights.
        recipe = MethodRecipe(mask=MaskRecipe(keep=self.keep), scales=SCALES, threshold=0.0)
        self.maskmatch = MaskMatch(self.segmenter, recipe, 0, 255).to(self.device).train()
        self.teacher = copy.deepcopy(self.segmenter).eval().requires_grad_(False)
        self.plain_teacher = copy.deepcopy(self.plain).eval().requires_grad_(False)
        draw = torch.Generator().manual_seed(0)
        shape = (self.images, 3, size, size)
        batch = Batch(
            torch.randint(256, shape, dtype=torch.uint8, generator=draw),
            torch.randint(self.classes, (self.images, size, size), generator=draw),
            torch.randint(256, shape, dtype=torch.uint8, generator=draw),
            torch.ones(self.images, size, size, dtype=torch.bool),
            view_draws(self.segmenter, recipe, 0, (size, size))(range(self.images)),
            tuple(range(self.images)),
        )
        self.step: Step = self.maskmatch.prepare(batch.to(self.device))
        self.scale = 1 / self.maskmatch.denominators(self.step).clamp(min=1)
        self.views = GraphedViews(self.segmenter)
        self.optimizers = {
            module: torch.optim.AdamW(module.parameters(), lr=1e-5) for module in (self.segmenter, self.plain)
        }

    def arithmetic(self) -> AbstractContextManager[None]:
        """A context for forwards of both steps."""
        return autocast(self.device, PRECISIONS[self.precision])

    # --- ours, part by part ------------------------------------------------------------------------------------------

    def pseudo_label(self) -> PseudoLabels:
        """The teacher at three scales."""
        with self.arithmetic():
            pseudo = self.maskmatch.pseudo_label(self.step, self.teacher)
        assert pseudo is not None
        return pseudo

    def view(self, part: str, pseudo: PseudoLabels) -> None:
        """Forward and backward of one view."""
        with self.arithmetic():
            loss, _ = self.maskmatch(part, self.step, pseudo, self.scale)
        loss.backward()

    def all_views(self, pseudo: PseudoLabels) -> None:
        """One view after the other, as `training.step.take_step` runs them."""
        for part in self.step.parts:
            self.view(part, pseudo)

    def update(self, student: nn.Module, teacher: nn.Module) -> None:
        """Optimizer and teacher, the same for both implementations."""
        self.optimizers[student].step()
        self.optimizers[student].zero_grad(set_to_none=self.maskmatch.graphs is None)
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1e-3)

    def ours(self) -> None:
        """One step of this package."""
        self.all_views(self.pseudo_label())
        self.update(self.segmenter, self.teacher)

    @cached_property
    def gradients(self) -> list[Tensor]:
        """Zeros in memory that gradients keep while graphs are replayed, one a parameter of the student."""
        return [torch.zeros_like(parameter) for parameter in self.segmenter.parameters()]

    def graphed(self) -> None:
        """The same step, each view's passes replayed as CUDA graphs (`engine.cuda_graphs`)."""
        for parameter, gradient in zip(self.segmenter.parameters(), self.gradients, strict=True):
            parameter.grad = gradient
        self.maskmatch.graphs = self.views
        self.ours()
        self.maskmatch.graphs = None

    # --- the straightforward step ------------------------------------------------------------------------------------

    @torch.no_grad()
    def plain_pseudo_label(self) -> PseudoLabels:
        """Full-resolution probabilities of every scale, then their mean."""
        assert self.step.unlabelled is not None
        images = self.maskmatch.normalise(self.step.unlabelled.weak.images)
        patch = self.segmenter.patch_px
        maps = []
        for scale in SCALES:
            sides = [max(patch, round(side * scale / patch) * patch) for side in images.shape[2:]]
            with self.arithmetic():
                logits = self.plain_teacher(up(images, sides))
            maps.append(up(logits.float(), images.shape[2:]).softmax(1))
        confidence, labels = torch.stack(maps).mean(0).max(1)
        return PseudoLabels(labels, confidence >= 0.0)

    def plain_pass(self, images: Tensor, target: Tensor, counted: Tensor) -> Tensor:
        """One view: forward, full-resolution logits, cross-entropy, backward."""
        with self.arithmetic():
            logits = self.plain(self.maskmatch.normalise(images))
        logits = up(logits.float(), target.shape[1:])
        loss = F.cross_entropy(logits, target.masked_fill(~counted, -100), reduction="sum") / counted.sum()
        loss.backward()
        return loss.detach()

    def plain_labelled(self) -> Tensor:
        """L_x."""
        return self.plain_pass(self.step.labelled_images, self.step.labels, self.step.labelled_pixels)

    def plain_strong(self, pseudo: PseudoLabels) -> Tensor:
        """L_u."""
        (view,) = self.step.views
        mixed = pseudo.mixed(view.cutmix)
        return self.plain_pass(view.images, mixed.labels, mixed.confident & view.valid)

    def plain_masked(self, pseudo: PseudoLabels) -> Tensor:
        """L_m with masked pixels zeroed."""
        assert self.step.masked is not None
        masked = self.step.masked
        grid = self.segmenter.unit_grid(self.image_size, self.image_size)
        # Zero in normalised space, as `mode="zero"` does: normalise, zero, and undo the normalisation for plain_pass.
        images = self.maskmatch.normalise(masked.view.images)
        painted = zero_masked_pixels(images, masked.visible, grid, self.segmenter.unit_px)
        painted = painted * self.maskmatch.std + self.maskmatch.mean
        return self.plain_pass(painted, pseudo.labels, pseudo.confident & masked.counted)

    def straightforward(self) -> None:
        """One step with three passes."""
        pseudo = self.plain_pseudo_label()
        self.plain_labelled()
        self.plain_strong(pseudo)
        self.plain_masked(pseudo)
        self.update(self.plain, self.plain_teacher)

    # --- what must agree ---------------------------------------------------------------------------------------------

    def disagreement(self) -> dict[str, float]:
        """How far both steps differ where their formulas are the same: labels (share of pixels), L_x and L_u.

        They are compared in eval mode, without dropout.
        """
        modules = (self.maskmatch, self.plain)
        for module in modules:
            module.eval()
        ours, theirs = self.pseudo_label(), self.plain_pseudo_label()
        with self.arithmetic():
            ours_x, ours_u = (
                self.maskmatch(part, self.step, ours, self.scale)[1] * self.scale[index]
                for index, part in enumerate(("loss_x", "loss_u"))
            )
        plain_x, plain_u = self.plain_labelled(), self.plain_strong(ours)
        for module in modules:
            module.zero_grad(set_to_none=True)
            module.train()
        return {
            "labels_differ": float((ours.labels != theirs.labels).double().mean()),
            "loss_x_differs": abs(float(ours_x - plain_x)),
            "loss_u_differs": abs(float(ours_u - plain_u)),
        }

    # --- counts ------------------------------------------------------------------------------------------------------

    def work(self, step: str) -> Work:
        """What `ours` or the `straightforward` step asks of the backbone: the latter computes masked units too."""
        recipe = self.maskmatch.recipe
        if step != "ours":
            recipe = recipe.model_copy(update={"mask": recipe.mask.model_copy(update={"mode": "zero"})})
        return step_work(self.segmenter, recipe, (self.image_size,) * 2, self.images, self.images)

    def limit(self) -> float:
        """Amdahl's limit of masking: the backbone's multiply–adds of a step without dropping, over those with it."""
        unit, size = self.segmenter.unit_px, self.image_size
        visible = visible_count(self.segmenter.unit_grid(size, size), self.keep)
        patch = self.segmenter.patch_px
        teacher = sum(
            encoder_macs(self.segmenter, side, side)
            for side in (max(patch, round(size * scale / patch) * patch) for scale in SCALES)
        )
        whole = encoder_train_macs(self.segmenter, size, size)
        assert size % unit == 0
        dropped = encoder_train_macs(self.segmenter, size, size, visible)
        return (teacher + 3 * whole) / (teacher + 2 * whole + dropped)
