"""What engine_overhead compares: one supervised step under torch's DDP and under our engine at every ZeRO stage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from maskmatch_scale.engine.optim import parameter_groups
from maskmatch_scale.engine.precision import autocast, autocast_dtype
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.engine.schedule import base_lr
from maskmatch_scale.engine.zero import ZeroEngine
from maskmatch_scale.method.losses import cross_entropy_sum
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.recipe import Recipe, parse_recipe

LR = 1e-4


@dataclass(frozen=True)
class Variant:
    """One way to take the step.

    `ddp` is what a user of plain torch writes. `alone` is the same without communication between ranks: the control of
    the check that all variants do the same work. `deepspeed` is our ZeroEngine.
    """

    library: str
    precision: str
    zero_stage: int | None = None
    persistence: int | None = None
    """stage3_param_persistence_threshold, elements; None: DeepSpeed's default (1e5)."""
    bf16_gradients: bool = False
    """bf16: gradients added and averaged in bf16, DeepSpeed's default, and not in fp32, ours."""
    fused: bool = False
    """DDP with torch's fused AdamW; all others use the implementation that torch chooses."""

    @property
    def name(self) -> str:
        """For tables and plots."""
        stage = "" if self.zero_stage is None else f" ZeRO-{self.zero_stage}"
        more = "" if self.persistence is None else f", persistence {self.persistence}"
        more += ", bf16 gradients" if self.bf16_gradients else ""
        return f"{self.library}{stage} {self.precision}{more}{', fused AdamW' if self.fused else ''}"

    @property
    def baseline(self) -> Variant:
        """DDP in the same arithmetic. DDP has no bf16 weights with fp32 masters, so bf16 is compared with autocast."""
        return Variant("ddp", "fp32" if self.precision == "fp32" else "autocast-bf16")

    @property
    def columns(self) -> dict[str, Any]:
        """The columns that identify the variant in a table."""
        return {
            "variant": self.name,
            "library": self.library,
            "zero_stage": self.zero_stage,
            "precision": self.precision,
            "persistence_threshold": self.persistence,
        }


FP32 = (
    Variant("ddp", "fp32"),
    Variant("ddp", "fp32", fused=True),
    *(Variant("deepspeed", "fp32", stage) for stage in range(4)),
    Variant("deepspeed", "fp32", 3, persistence=0),
)
BF16 = (
    Variant("ddp", "autocast-bf16"),
    *(Variant("deepspeed", "bf16", stage) for stage in (1, 2, 3)),
    *(Variant("deepspeed", "bf16", stage, bf16_gradients=True) for stage in (1, 2, 3)),
)
AUTOCAST = (
    Variant("ddp", "autocast-bf16"),
    *(Variant("deepspeed", "autocast-bf16", stage) for stage in range(4)),
)
"""By itself, and last: DeepSpeed's autocast sets a flag in the process that all its optimizers read in every step."""


class Supervised(nn.Module):
    """The labelled view and its loss: the module that every variant wraps."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy over the rank's pixels, and its sum (1,).

        Args:
            images: normalised fp32 (B, 3, H, W).
            labels: int64 (B, H, W); every pixel counts.
        """
        logits = self.segmenter(images.to(next(self.segmenter.parameters()).dtype))
        total = cross_entropy_sum(logits, labels, torch.ones_like(labels, dtype=torch.bool))
        return total / labels.numel(), total.detach()[None]


class Trainer(Protocol):
    """A variant, built."""

    student: Segmenter

    def backward(self, images: Tensor, labels: Tensor) -> None:
        """Forward and backward: gradients averaged over ranks, nothing updated yet."""

    def update(self, number: int) -> None:
        """Optimizer step ``number``, from 0."""

    def weights(self, *, keep: bool) -> dict[str, Tensor]:
        """Whole fp32 weights on the CPU (of masters, where there are some); all ranks call it together."""


class DdpTrainer:
    """Plain torch: DistributedDataParallel with gradients as views of its buckets, AdamW over the same groups."""

    def __init__(self, segmenter: Segmenter, recipe: Recipe, runtime: Runtime, variant: Variant) -> None:
        self.student = segmenter
        module: nn.Module = Supervised(segmenter)
        if variant.library == "ddp":
            devices = [runtime.device] if runtime.device.type == "cuda" else None
            module = DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)
        self._module = module
        self._device = runtime.device
        self._dtype = autocast_dtype(recipe)
        groups = parameter_groups(segmenter, recipe.optim)
        lr = base_lr(recipe, runtime.world_size)
        # None, not False: then torch chooses as if the argument were left out.
        self._optimizer = torch.optim.AdamW(groups, lr=lr, betas=recipe.optim.betas, fused=variant.fused or None)

    def backward(self, images: Tensor, labels: Tensor) -> None:
        """See `Trainer`."""
        with autocast(self._device, self._dtype):
            loss, _ = self._module(images, labels)
        loss.backward()

    def update(self, number: int) -> None:
        """See `Trainer`."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def weights(self, *, keep: bool) -> dict[str, Tensor]:
        """See `Trainer`."""
        return {name: value.detach().cpu() for name, value in self.student.named_parameters() if keep}


class ZeroTrainer:
    """Our engine, called as the training loop calls it."""

    def __init__(self, segmenter: Segmenter, recipe: Recipe, runtime: Runtime) -> None:
        self.student = segmenter
        self.engine = ZeroEngine(Supervised(segmenter), segmenter, recipe, runtime)

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's own engine, whose buffers are measured."""
        return self.engine._engine

    def backward(self, images: Tensor, labels: Tensor) -> None:
        """See `Trainer`."""
        self.engine.accumulate(images, labels, last=True)

    def update(self, number: int) -> None:
        """See `Trainer`."""
        self.engine.step(number)

    def weights(self, *, keep: bool) -> dict[str, Tensor]:
        """See `Trainer`; at ZeRO-1 to 3 the masters are gathered one at a time."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        for name, parameter in self.student.named_parameters():
            # None: DeepSpeed has no master of an fp32 weight at ZeRO-0.
            master = safe_get_full_fp32_param(parameter)
            value = parameter.detach() if master is None else master
            if keep:
                found[name] = value.cpu()
        return found


def build_trainer(variant: Variant, segmenter: Segmenter, recipe: Recipe, runtime: Runtime) -> Trainer:
    """The variant around ``segmenter``, which belongs to it from then on."""
    if variant.library == "deepspeed":
        return ZeroTrainer(segmenter, recipe, runtime)
    return DdpTrainer(segmenter, recipe, runtime, variant)


def build_student(options: dict[str, Any], backbone: str, device: torch.device) -> Segmenter:
    """A segmenter with the same random weights at every call and on every rank, without context decoder.

    It is built where it will be: on one CPU thread the random weights of a large model take many seconds.
    """
    torch.manual_seed(0)
    with device:
        segmenter = build_segmenter(
            backbone,
            options["classes"],
            head="linear",
            image_size=options["image_size"],
            context=False,
            backbone_options=options["backbone_options"],
        )
    return segmenter.train()


def build_recipe(variant: Variant, options: dict[str, Any], folder: Path, more: dict[str, Any] | None = None) -> Recipe:
    """A recipe whose `engine` and `optim` sections are the variant's: constant learning rate, never clipped.

    Args:
        variant: stage, precision, persistence threshold and type of gradients.
        options: of the benchmark; `batch` images a rank.
        folder: of this rank alone, for the file with further DeepSpeed settings.
        more: further keys of DeepSpeed's `zero_optimization`.
    """
    zero = dict(more or {})
    if variant.persistence is not None:
        zero["stage3_param_persistence_threshold"] = variant.persistence
    engine: dict[str, Any] = {"micro_batch": options["batch"], "precision": variant.precision, "threads": 1}
    engine["zero_stage"] = variant.zero_stage or 0
    settings: dict[str, Any] = {"zero_optimization": zero} if zero else {}
    if variant.bf16_gradients:
        settings |= {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"}
    if settings and variant.library == "deepspeed":
        parts = [variant.name.replace(" ", "-"), *(f"{key}={value}" for key, value in zero.items())]
        file = folder / f"{'-'.join(parts)}.json"
        file.write_text(json.dumps(settings))
        engine["deepspeed_json"] = str(file)
    return parse_recipe(
        {
            "data": {"root": "none"},
            "model": {"backbone": options["backbone"]},
            "optim": {"lr": LR, "schedule": "constant", "clip_norm": None},
            "engine": engine,
            "run": {"dir": "none", "steps": 1_000_000},
        }
    )


def build_batch(options: dict[str, Any], runtime: Runtime, images: int) -> tuple[Tensor, Tensor]:
    """Noise that differs on every rank: fp32 images (B, 3, H, W) and int64 labels (B, H, W)."""
    draw = torch.Generator().manual_seed(1000 + runtime.rank)
    side = options["image_size"]
    pixels = torch.randn(images, 3, side, side, generator=draw)
    labels = torch.randint(0, options["classes"], (images, side, side), generator=draw)
    return pixels.to(runtime.device), labels.to(runtime.device)
