"""Bytes of what a rank keeps from step to step: weights, masters, moments, gradients, averages, buffers of DeepSpeed.

ZeRO's formulas (Rajbhandari et al., arXiv 1910.02054, section 5) for what DeepSpeed 0.19 does with the settings of
`engine.zero.deepspeed_config`.

Decision: docs/decisions/0074-memory-planned-by-running-the-step.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from maskmatch_scale.engine.precision import autocast_dtype, weights_dtype
from maskmatch_scale.engine.zero import BUCKET_ELEMENTS, deepspeed_config
from maskmatch_scale.planning.subject import Subject
from maskmatch_scale.recipe import EngineRecipe

LIVE_ELEMENTS, PREFETCH_ELEMENTS = 1_000_000_000, 50_000_000
"""DeepSpeed's defaults for `stage3_max_live_parameters` and `stage3_prefetch_bucket_size`."""
PERSISTENT_ELEMENTS = 100_000
"""Its default for `stage3_param_persistence_threshold`: smaller weights are whole on every rank once they were used."""
REDUCED_AT_ONCE = 500_000_000
"""Elements of gradients that DeepSpeed averages together where it has no buckets of its own: at stage 0, and at stage 1
with bf16 weights."""


def bytes_a_parameter(
    zero_stage: int, precision: str, *, bf16_gradients: bool = False
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes per trained parameter that a rank keeps: those it keeps whole, and those divided by the number of ranks.

    Weights and gradients of 2 or 4 bytes, 12 of optimizer state (fp32 master and AdamW's two moments). Gradients of
    bf16 weights are added in fp32. With fp32 weights DeepSpeed keeps a separate fp32 master all the same from stage 1
    on; DDP and stage 0 have none. At stage 1 gradients stay whole until the step, since several backward passes may add
    to them.

    Args:
        zero_stage: 0 for DDP too.
        precision: of the recipe, not `auto`.
        bf16_gradients: whether gradients of bf16 weights are added in bf16, which only a DeepSpeed JSON asks for.
    """
    wide = 2 if precision in ("bf16", "fp16") and zero_stage else 4
    gradients = 2 if bf16_gradients or (precision == "fp16" and zero_stage) else 4
    state = {"weights": wide, "gradients": gradients, "masters": 4 if zero_stage else 0, "moments": 8}
    divided = {"masters", "moments"} if zero_stage else set()
    if zero_stage >= 2:
        divided |= {"gradients"}
    if zero_stage == 3:
        divided |= {"weights"}
    return (
        {name: size for name, size in state.items() if name not in divided and size},
        {name: size for name, size in state.items() if name in divided},
    )


@dataclass(frozen=True)
class States:
    """Bytes of one rank, by component, on its device."""

    weights: int
    """Of the student: trained and frozen ones and buffers; at stage 3 this rank's shards, and small weights whole."""
    masters: int
    """fp32 copies of the trained weights, which the optimizer changes."""
    moments: int
    """Two of AdamW, fp32."""
    gradients: int
    """Added over the views of a step; where they are kept between steps is the engine's business."""
    average: int
    """The fp32 average of the student, the teacher of most recipes."""
    frozen_teacher: int
    """`method.teacher`, fp32."""
    buckets: int
    """In which gradients are averaged. At stage 3 they are always there, at 1 and 2 from the first gradient on."""
    gathered: int
    """Whole weights at stage 3, while the student or the teacher runs."""

    @property
    def kept(self) -> int:
        """What is there between steps, without gradients and buckets that some engines keep."""
        return self.weights + self.masters + self.moments + self.average + self.frozen_teacher

    @property
    def by_name(self) -> dict[str, int]:
        """All components."""
        return asdict(self)


@dataclass(frozen=True)
class HostStates:
    """Bytes of one rank in host memory."""

    offloaded: int
    """Masters, moments and fp32 gradients (`engine.offload_optimizer`), shards (`engine.offload_parameters`)."""
    building: int
    """At most while the run is built: whole models up to stage 2, shards and the largest weight at stage 3."""
    checkpoint: int
    """A copy of this rank's part of the state while a checkpoint is written."""

    @property
    def peak(self) -> int:
        """The most at once: a run is built before it writes checkpoints."""
        return max(self.building, self.offloaded + self.checkpoint)


def states(subject: Subject, ranks: int) -> tuple[States, HostStates]:
    """What one of ``ranks`` ranks keeps, on its device and in host memory.

    Raises:
        UserError: `engine.deepspeed_json` is wrong.
    """
    recipe, student = subject.recipe, subject.student
    engine = recipe.engine
    stage, is_deepspeed = engine.zero_stage, engine.library == "deepspeed"
    zero = deepspeed_config(recipe, ranks)["zero_optimization"] if is_deepspeed else {}
    trained = numel(p for p in student.parameters() if p.requires_grad)
    frozen = numel(p for p in student.parameters() if not p.requires_grad)
    buffers = sum(buffer.nbytes for buffer in student.buffers())
    whole, divided = bytes_a_parameter(stage, engine.precision if is_deepspeed else "fp32")
    sizes = {name: trained * size for name, size in whole.items()}
    sizes |= {name: -(-trained * size // ranks) for name, size in divided.items()}
    wide = weights_dtype(recipe).itemsize if is_deepspeed else 4
    shares = ranks if stage == 3 else 1
    weights = sizes["weights"] + -(-frozen * wide // shares)
    average = -(-(trained + frozen) * 4 // shares)
    teacher = _bytes(subject.frozen_teacher) if subject.frozen_teacher is not None else 0
    optimizer = sizes.get("masters", 0) + sizes["moments"]
    off_device = offloaded = 0
    if engine.offload_optimizer:
        # The masters' gradients are fp32 and lie beside them.
        offloaded += optimizer + -(-trained * 4 // ranks)
    if engine.offload_parameters:
        off_device = weights + average
        offloaded += off_device
    host = HostStates(
        offloaded=offloaded,
        building=_building(student, teacher, wide, ranks if stage == 3 else None),
        checkpoint=-(-(16 * trained + 8 * frozen) // ranks),
    )
    persistent = _persistent_bytes(subject, zero, wide)
    on_device = States(
        weights=buffers + persistent + (0 if engine.offload_parameters else weights),
        masters=0 if engine.offload_optimizer else sizes.get("masters", 0),
        moments=0 if engine.offload_optimizer else sizes["moments"],
        gradients=sizes["gradients"],
        average=buffers + (0 if engine.offload_parameters else average),
        frozen_teacher=teacher,
        buckets=_bucket_bytes(subject, zero),
        gathered=max(0, _gathered_bytes(subject, zero, trained + frozen, wide) - persistent),
    )
    return on_device, host


def numel(parameters: Iterable[Tensor]) -> int:
    """Elements of all of them."""
    return sum(parameter.numel() for parameter in parameters)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _bucket_bytes(subject: Subject, zero: dict[str, Any]) -> int:
    """DeepSpeed's buffers for gradients; stage 0, and stage 1 with bf16 weights, have none."""
    engine = subject.recipe.engine
    if not zero or engine.zero_stage == 0 or keeps_flat_gradients(engine):
        return 0
    elements = int(zero.get("reduce_bucket_size", BUCKET_ELEMENTS))
    if engine.zero_stage == 3:
        return elements * (2 if engine.precision == "fp16" else 4)  # of the type in which they are sent
    return elements * weights_dtype(subject.recipe).itemsize * (2 if zero.get("overlap_comm") else 1)


def keeps_flat_gradients(engine: EngineRecipe) -> bool:
    """Whether DeepSpeed's `BF16_Optimizer` runs: fp32 gradients in one piece of memory, kept between steps."""
    return engine.library == "deepspeed" and engine.zero_stage == 1 and engine.precision == "bf16"


def _persistent_bytes(subject: Subject, zero: dict[str, Any], wide: int) -> int:
    """Weights that stage 3 keeps whole, because they are small."""
    if subject.recipe.engine.zero_stage < 3:
        return 0
    most = int(zero.get("stage3_param_persistence_threshold", PERSISTENT_ELEMENTS))
    return wide * sum(p.numel() for p in subject.student.parameters() if p.numel() <= most)


def _gathered_bytes(subject: Subject, zero: dict[str, Any], elements: int, wide: int) -> int:
    """The larger of what student and teacher gather."""
    if subject.recipe.engine.zero_stage < 3:
        return 0
    live = int(zero.get("stage3_max_live_parameters", LIVE_ELEMENTS))
    prefetch = int(zero.get("stage3_prefetch_bucket_size", PREFETCH_ELEMENTS))
    of_teacher = 4 if autocast_dtype(subject.recipe) is None else 2
    # A bucket of the teacher's is there twice while its weights are cut out of what was received.
    teacher = 0 if subject.frozen_teacher is not None else min(elements, live) + min(elements, prefetch)
    return max(min(elements, live) * wide, teacher * of_teacher)


def _building(student: nn.Module, teacher: int, wide: int, ranks: int | None) -> int:
    """Up to stage 2 (None) student and average whole in fp32; at stage 3 by the limit of docs/zero.md."""
    elements = numel(student.parameters())
    if ranks is None:
        return 2 * 4 * elements + teacher
    largest = max(parameter.numel() for parameter in student.parameters())
    return elements * (wide + 4) // ranks + 64_000_000 + 3 * 4 * largest + teacher
