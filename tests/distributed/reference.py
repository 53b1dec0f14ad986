"""Training as anyone would write it down: one process, whole weights, plain PyTorch, nothing of `engine`.

The losses are the package's own (their formulas are tested in tests/method); everything else that a step does is
written out here: micro-batches, mixed precision, clipping, AdamW and its groups, the learning rate, the average.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.method.maskmatch import MaskMatch, view_draws
from maskmatch_scale.runs.model import build_student, open_run

UNDECAYED = ("pos_embed", "cls_token")


@dataclass
class Outcome:
    """What a plain run ends with."""

    start: dict[str, torch.Tensor]
    """Weights before the first step."""
    student: dict[str, torch.Tensor]
    """fp32 weights and buffers."""
    teacher: dict[str, torch.Tensor]
    teacher_logits: torch.Tensor
    """Of :func:`probe_images`."""
    losses: list[float]
    grad_norms: list[float]


def probe_images() -> torch.Tensor:
    """Normalised images (3, 3, 64, 64), the same for everyone."""
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(7))


def train_plainly(recipe, world_size: int) -> Outcome:
    """Train with the global batch that ``world_size`` ranks have together."""
    engine = recipe.engine
    global_engine = engine.model_copy(update={"micro_batch": engine.micro_batch * world_size})
    # One process shows what each rank shows, in the order of the ranks.
    data = recipe.data.model_copy(update={"lanes": world_size})
    student = build_student(recipe, ShardIndex.load(recipe.data.root))
    if recipe.optim.freeze is not None:
        student.freeze(recipe.optim.freeze)
    stream = TrainingBatches(
        recipe.model_copy(update={"engine": global_engine, "data": data}),
        3,
        0,
        1,
        unlabelled=True,
        draw=view_draws(student, recipe.method, recipe.run.seed, recipe.data.crop_px),
    )
    start = {name: value.clone() for name, value in student.state_dict().items()}
    teacher = copy.deepcopy(student).eval()
    masters = [parameter.detach().clone().requires_grad_() for parameter in student.parameters()]
    if engine.precision == "bf16":
        for parameter in student.parameters():
            parameter.data = parameter.data.bfloat16()
    step_module = MaskMatch(student, recipe.method, recipe.run.seed, 255, batchnorm_frozen=_frozen(recipe))
    optimizer = torch.optim.AdamW(_groups(student, masters, recipe), lr=1.0, betas=recipe.optim.betas)
    # The teacher has fp32 weights always; only its arithmetic is bf16 in the bf16 precisions.
    teacher_arithmetic = contextlib.nullcontext() if engine.precision == "fp32" else _bf16_arithmetic()
    student_arithmetic = _bf16_arithmetic() if engine.precision == "autocast-bf16" else contextlib.nullcontext()

    def teach(images):
        with torch.no_grad(), teacher_arithmetic:
            return teacher(images)

    def label(micro):
        if recipe.method.teacher == "ema":
            return step_module.pseudo_label(micro, teach)
        with teacher_arithmetic:
            return step_module.pseudo_label(micro, frozen, lambda images: (images - mean) / std)

    if recipe.method.teacher != "ema":
        frozen = open_run(Path(recipe.method.teacher), "ema")[1]
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (frozen.mean, frozen.std))

    losses, norms = [], []
    for number in range(recipe.run.steps):
        step_module.train()
        micros = [
            step_module.prepare(stream[number * engine.accumulation + micro]) for micro in range(engine.accumulation)
        ]
        pixels = sum(step_module.denominators(micro) for micro in micros)
        total = 0.0
        for micro in micros:
            pseudo = label(micro)
            # The order matters to BatchNorm's running statistics alone.
            for part in micro.parts:
                with student_arithmetic:
                    loss, _ = step_module(part, micro, pseudo, 1 / pixels)
                loss.backward()
                total += float(loss.detach())
        losses.append(total)
        for master, parameter in zip(masters, student.parameters(), strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        limit = recipe.optim.clip_norm or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters, limit)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _rate(number, recipe)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, student.parameters(), strict=True):
                parameter.copy_(master)
            _average(teacher, student, masters, number + 1, recipe)
    final = dict(student.state_dict())
    final |= {name: master.detach() for (name, _), master in zip(student.named_parameters(), masters, strict=True)}
    return Outcome(start, final, teacher.state_dict(), teach(probe_images()), losses, norms)


def _bf16_arithmetic():
    return torch.autocast("cpu", torch.bfloat16)


def _frozen(recipe) -> bool:
    return recipe.model.batchnorm == "frozen"


def _groups(student, masters, recipe):
    """One group a parameter: its own weight decay and peak learning rate."""
    optim = recipe.optim
    depth = recipe.model.backbone_options.get("depth", 0)
    groups = []
    for (name, parameter), master in zip(student.named_parameters(), masters, strict=True):
        peak = optim.lr * optim.head_lr_multiplier
        if name.startswith("backbone."):
            layer = 0
            if name.startswith("backbone.blocks."):
                layer = 1 + int(name.split(".")[2])
            elif name.startswith("backbone.norm."):
                layer = depth  # timm: the final norm belongs to the last block
            peak = optim.lr * optim.layer_decay ** (depth - layer)
        plain = parameter.dim() == 1 or name.endswith(UNDECAYED)
        groups.append({"params": [master], "weight_decay": 0.0 if plain else optim.weight_decay, "peak": peak})
    return groups


def _rate(number, recipe) -> float:
    warmup, steps = recipe.optim.warmup_steps, recipe.run.steps
    if number < warmup:
        return (number + 1) / warmup
    return (1 - (number - warmup) / (steps - warmup)) ** recipe.optim.poly_power


def _average(teacher, student, masters, steps_taken, recipe) -> None:
    decay = min(1 - 1 / (steps_taken + 1), recipe.method.ema_decay)
    for average, master in zip(teacher.parameters(), masters, strict=True):
        average.copy_(decay * average + (1 - decay) * master)
    for average, buffer in zip(teacher.buffers(), student.buffers(), strict=True):
        if average.is_floating_point() and recipe.method.ema_buffers == "average":
            average.copy_(decay * average + (1 - decay) * buffer)
        else:
            average.copy_(buffer)
