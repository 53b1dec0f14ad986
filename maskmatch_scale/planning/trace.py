"""What each pass of a step computes and keeps in memory: its own code, run without memory.

Decision: docs/decisions/0074-memory-planned-by-running-the-step.md.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from maskmatch_scale.data.batches.batch import Batch
from maskmatch_scale.engine.precision import autocast, autocast_dtype, weights_dtype
from maskmatch_scale.method.maskmatch import PARTS, MaskMatch, view_draws
from maskmatch_scale.models import Segmenter
from maskmatch_scale.models.resample import planned_for
from maskmatch_scale.planning.recorder import Operation, Recorder
from maskmatch_scale.planning.shortened import alike_blocks, shortened
from maskmatch_scale.planning.subject import Subject
from maskmatch_scale.recipe.bases import has_unlabelled_loss
from maskmatch_scale.recipe.learning import makes_views, uses_unlabelled

Pass = Literal["views", "teacher", "loss_x", "loss_u", "loss_m"]
"""views: what is drawn and made of a micro-batch on the device. teacher: its pseudo-labels, at all scales. The others
are forward and backward passes of the student, by the names in `method.maskmatch.PARTS`: labelled images, all views of
the base together, and the masked view."""


@dataclass(frozen=True)
class Trace:
    """One pass of one micro-batch on one rank."""

    operations: tuple[Operation, ...]
    """In the order in which they run; of blocks that are alike in the order of one."""
    saved_bytes: int
    """Of activations that are kept when the forward pass has ended; 0 for a pass without gradients."""
    peak_bytes: int
    """The most that is held at once beside weights, gradients of weights, and what earlier passes have left. A gradient
    of one weight is in it until it is added to the others. Work spaces within a kernel are not counted."""
    late_peak_bytes: int
    """The same from the moment on when the first gradient of a weight is there: engines make their buckets then."""
    left_bytes: int
    """What the pass leaves for the rest of the step: the batch and its views, or pseudo-labels."""
    forward_peak_bytes: int = 0
    """As `peak_bytes`, of the forward pass alone."""


def extended(one: Trace, more: Trace, blocks: int) -> Trace | None:
    """The trace of a model with more blocks that are alike, from those of it with k and with k + 1 of them.

    None if it cannot be said. Every block adds the same to each moment after it: what it keeps (`saved_bytes`), and in
    the forward pass also what autocast keeps until its end, weights in 16 bits. So a peak that grows by as much as any
    other moment does is at the same moment for every number of blocks. One that grows by less may be at another.

    Args:
        one: with k blocks.
        more: with k + 1 blocks.
        blocks: how many there are beside the k.
    """
    saved, forward, peak, late, left = (
        getattr(more, name) - getattr(one, name)
        for name in ("saved_bytes", "forward_peak_bytes", "peak_bytes", "late_peak_bytes", "left_bytes")
    )
    before, after = Counter(one.operations), Counter(more.operations)
    if not peak >= forward >= saved == late or left or before - after:
        return None
    counts = {operation: before[operation] + blocks * (count - before[operation]) for operation, count in after.items()}
    return Trace(
        tuple(replace(operation, count=count) for operation, count in counts.items()),
        one.saved_bytes + blocks * saved,
        one.peak_bytes + blocks * peak,
        one.late_peak_bytes + blocks * late,
        one.left_bytes,
        one.forward_peak_bytes + blocks * forward,
    )


def passes_of(subject: Subject) -> tuple[Pass, ...]:
    """The passes of a step after the burn-in. Each view of the student is one, forward and backward."""
    method = subject.recipe.method
    passes: list[Pass] = ["views"]
    if uses_unlabelled(method):
        passes.append("teacher")
    if subject.labelled_images:
        passes.append("loss_x")
    if has_unlabelled_loss(method.base):
        passes.append("loss_u")
    if method.mask.keep is not None:
        passes.append("loss_m")
    return tuple(passes)


def images_of(subject: Subject, part: Pass) -> int:
    """How many images of a micro-batch a pass is about: the argument `images` of `trace`."""
    of_labelled = part == "loss_x" or not uses_unlabelled(subject.recipe.method)
    return subject.labelled_images if of_labelled else subject.unlabelled_images


def trace(subject: Subject, part: Pass, images: int) -> Trace:
    """Run one pass of a step on tensors without memory, and record what it does.

    The code is that of training: views, teacher, student, losses with their upsampled logits. Operations are those of
    torch's CPU backend, whose attention is a flash kernel as on a GPU. Sizes of chunks and bands are those of
    `subject.device`, and so are the types that autocast chooses. Nothing is sent to other ranks.

    Args:
        subject: the recipe and its models.
        part: which pass.
        images: labelled images for `loss_x`, else images that views are made of (for one view; there may be several);
            at least 1. To "views" come as many labelled ones as in a micro-batch of the subject, in proportion.
    """
    model = subject.student if _has_gradients(part) else subject.like or subject.student
    known = _TRACES.setdefault(model, {})
    key = _what_it_depends_on(subject, part, images)
    if key not in known:
        known[key] = _trace(subject, part, images)
    return known[key]


_TRACES: WeakKeyDictionary[Segmenter, dict[Hashable, Trace]] = WeakKeyDictionary()
"""By model: a plan compares many settings, and most of them leave most passes as they are."""


def _has_gradients(part: Pass) -> bool:
    return part.startswith("loss_")


def _what_it_depends_on(subject: Subject, part: Pass, images: int) -> Hashable:
    recipe = subject.recipe
    engine, method = recipe.engine, recipe.method.model_dump()
    if part != "loss_m":
        method["mask"]["keep"] = method["mask"]["keep"] is not None
    if part == "loss_x":
        method = {"class_weights": method["class_weights"]}
    images_too = (subject.labelled_images, subject.unlabelled_images) if part == "views" else ()
    sharded = _has_gradients(part) and engine.zero_stage == 3  # `models.recompute` does not recompute without gradients
    arithmetic = (engine.precision, engine.library, sharded, recipe.model.batchnorm, subject.device)
    frozen = id(subject.frozen_teacher)
    return part, images, images_too, recipe.data.crop_px, arithmetic, repr(method), frozen, subject.student.frozen


def _trace(subject: Subject, part: Pass, images: int) -> Trace:
    """By models with few of the blocks that are alike, where that is enough."""
    student, taught = subject.student, subject.frozen_teacher or subject.student
    if part == "views":  # no model runs
        return _traced(subject, part, images, shortened(student, 1), shortened(taught, 1))
    blocks = alike_blocks(taught if part == "teacher" else student)
    short: list[Trace] = []
    for kept in _SHORT if blocks >= _FEWEST_BLOCKS else ():
        short.append(_traced(subject, part, images, shortened(student, kept), shortened(taught, kept)))
        found = extended(short[-2], short[-1], blocks - kept + 1) if len(short) > 1 else None
        if found is not None:
            return found
    return _traced(subject, part, images, copy.deepcopy(student), copy.deepcopy(taught))


_SHORT = (1, 2, 3)
"""Numbers of blocks. With one the peak may be at a moment of its own: then the third decides."""
_FEWEST_BLOCKS = 6
"""From so many on short models take less time than a whole one."""


def _traced(subject: Subject, part: Pass, images: int, student: Segmenter, taught: Segmenter) -> Trace:
    """Of these models, which are changed."""
    if subject.device == "cuda":
        for module in (*student.modules(), *taught.modules()):
            if isinstance(module, _NORMS):
                module.register_forward_pre_hook(_in_fp32)
    with _without_memory(subject):
        maskmatch = _maskmatch(subject, student)
        teacher = _Teacher(_placed(taught).eval().requires_grad_(False), autocast_dtype(subject.recipe))
        normalise = None if subject.frozen_teacher is None else lambda images: (images - maskmatch.mean) / maskmatch.std
        batch = _batch(subject, student, part, images)
        recorder = Recorder()
        if part == "views":
            with recorder:
                for tensor in batch.tensors:
                    recorder.count(tensor)
                step = maskmatch.prepare(batch)
            return _trace_of(recorder, 0)
        step = maskmatch.prepare(batch)
        if part == "teacher":
            with recorder:
                pseudo = maskmatch.pseudo_label(step, teacher, normalise)
            return _trace_of(recorder, 0)
        labels = teacher if maskmatch.base.needs_probabilities else _any_logits(student.num_classes)
        pseudo = maskmatch.pseudo_label(step, labels, normalise)
        scale = torch.ones(len(PARTS), dtype=torch.float64)

        def take_gradient(parameter: Tensor) -> None:
            recorder.first_gradient()
            parameter.grad = None

        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(take_gradient)  # type: ignore[no-untyped-call]
        with recorder:
            with _arithmetic(subject):
                loss, total = maskmatch(part, step, pseudo, scale)
            saved, forward_peak = recorder.live_bytes, recorder.peak_bytes
            recorder.in_backward = True
            loss.backward()
            del loss, total
        return replace(_trace_of(recorder, saved), forward_peak_bytes=forward_peak)


def _trace_of(recorder: Recorder, saved_bytes: int) -> Trace:
    return Trace(
        tuple(recorder.operations),
        saved_bytes,
        recorder.peak_bytes,
        recorder.late_peak_bytes,
        recorder.live_bytes,
        recorder.peak_bytes,
    )


_DEVICE = torch.device("cpu")
"""Of the tensors without memory. Those of a GPU that is not there have no backward pass, and on the meta device torch
chooses the attention that keeps its matrix."""


@contextmanager
def _without_memory(subject: Subject) -> Iterator[None]:
    """Tensors that are made in this context have no memory; what was kept by functions for real ones is forgotten."""
    # A ZeRO-3 engine that this process has had leaves its own product of linear layers, for parameters of its own kind.
    product, functional.linear = functional.linear, torch._C._nn.linear
    try:
        # Real tensors are allowed: constants that the host makes, such as weights of upsampling.
        with planned_for(subject.device), FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        functional.linear = product


def _in_fp32(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Before a norm: autocast has it in fp32 on GPUs, and not on CPUs."""
    if not torch.is_autocast_enabled(_DEVICE.type):
        return given
    return tuple(tensor.float() for tensor in given)


_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def _arithmetic(subject: Subject) -> AbstractContextManager[None]:
    """Of the student: 16-bit weights under DeepSpeed need no autocast."""
    engine = subject.recipe.engine
    plain = engine.library == "deepspeed" and engine.precision in ("bf16", "fp16")
    return autocast(_DEVICE, None if plain else autocast_dtype(subject.recipe))


def _maskmatch(subject: Subject, student: Segmenter) -> MaskMatch:
    """The student and its losses, ready for training, without memory."""
    recipe = subject.recipe
    _placed(student, weights_dtype(recipe) if recipe.engine.library == "deepspeed" else torch.float32)
    for parameter in student.parameters():
        if recipe.engine.zero_stage == 3:
            parameter.ds_id = 0  # type: ignore[attr-defined]  # what `models.recompute` knows sharded weights by
    method, classes = recipe.method, student.num_classes
    return MaskMatch(
        student,
        method,
        recipe.run.seed,
        255,
        None if method.class_weights == "none" else torch.ones(classes),
        threshold=None if isinstance(method.threshold, float) else torch.ones(classes, dtype=torch.float64),
        batchnorm_frozen=recipe.model.batchnorm == "frozen",
    ).train()


def _placed(segmenter: Segmenter, weights: torch.dtype = torch.float32) -> Segmenter:
    """A segmenter on the meta device, with other tensors in place, which have a device and no memory."""
    for module in segmenter.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(_like(value).to(weights), requires_grad=value.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _like(buffer)
    return segmenter


def _like(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device=_DEVICE)


def _batch(subject: Subject, student: Segmenter, part: Pass, images: int) -> Batch:
    """A micro-batch for a pass: only the images that it is about; for "views" labelled ones too, in proportion."""
    recipe = subject.recipe
    method, crop = recipe.method, recipe.data.crop_px
    labelled, unlabelled = images, 0
    if uses_unlabelled(method) and part != "loss_x":
        share = subject.labelled_images / subject.unlabelled_images if part == "views" else 0
        labelled, unlabelled = round(images * share), images
    views = makes_views(method) and part != "loss_x"
    draws = view_draws(student, method, recipe.run.seed, crop).width if views else 0
    batch = Batch.empty(labelled, unlabelled, crop, draws, method.teacher_margin_px, student.in_channels)
    return replace(batch, positions=tuple(range(images)) if views else ())


@dataclass(frozen=True)
class _Teacher:
    """As `engine.ema.ReplicatedTeacher` and `engine.frozen_teacher.FrozenTeacher` label."""

    module: Segmenter
    dtype: torch.dtype | None

    @property
    def patch_px(self) -> int:
        return self.module.patch_px

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        with autocast(_DEVICE, self.dtype):
            logits: Tensor = self.module(images)
        return logits


def _any_logits(classes: int) -> Callable[[Tensor], Tensor]:
    """A teacher that costs nothing; no pass depends on what it says."""
    return lambda images: torch.zeros(len(images), classes, 1, 1)
