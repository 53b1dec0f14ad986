"""Whether what a rank keeps from step to step fits on its GPU at all: a part of `training/preflight.py`.

Activations are left out, so that nothing that could run is refused; `maskmatch plan` counts them too.
"""

from __future__ import annotations

import torch

from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.setup import device_of
from maskmatch_scale.errors import UserError
from maskmatch_scale.models import Segmenter
from maskmatch_scale.planning.states import states
from maskmatch_scale.planning.subject import Subject
from maskmatch_scale.recipe import Recipe


def check_memory(recipe: Recipe, student: Segmenter, frozen_teacher: Segmenter | None, place: Place) -> None:
    """Refuse a recipe whose states alone are more than the memory of this rank's GPU. On a CPU nothing is done.

    Raises:
        UserError: names what is needed and what there is, and what to do. Or there is no GPU for this rank.
    """
    device = device_of(place)
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        check_states(Subject(recipe, student, frozen_teacher, 0, 0), place.world_size, gpu.total_memory, gpu.name)


def check_states(subject: Subject, ranks: int, memory_bytes: int, gpu: str) -> None:
    """Refuse a recipe whose states alone are more than some memory.

    Args:
        subject: recipe, with its precision, and models; numbers of images do not count.
        ranks: that share the states.
        memory_bytes: of one GPU.
        gpu: its name, for the message.

    Raises:
        UserError: as for :func:`check_memory`.
    """
    own, _ = states(subject, ranks)
    need = own.kept + own.gradients
    if need <= memory_bytes:
        return
    engine = subject.recipe.engine
    raise UserError(
        f"engine.zero_stage={engine.zero_stage}: weights, optimizer, gradients and average of a rank take "
        f"{need / 1e9:.3g} GB, and the {gpu} has {memory_bytes / 1e9:.3g}; ask `maskmatch plan RECIPE --gpus {ranks}` "
        "for settings that fit: a higher engine.zero_stage, engine.offload_optimizer=true, or more GPUs"
    )
