"""Memory at every ZeRO stage and offload choice, beside the recipe's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from maskmatch_scale.planning.build import Built, rebuilt
from maskmatch_scale.planning.memory import step_peak
from maskmatch_scale.planning.setting import Cluster
from maskmatch_scale.planning.states import states

CHOICES = (
    (0, ()),
    (1, ()),
    (2, ()),
    (3, ()),
    (2, ("optimizer",)),
    (3, ("optimizer",)),
    (3, ("optimizer", "parameters")),
)
"""ZeRO stages, and what lies in host memory."""


@dataclass(frozen=True)
class Stage:
    """One choice, bytes of a rank."""

    zero_stage: int
    offloaded: tuple[str, ...]
    states_bytes: int
    """On the device, gradients included."""
    kept_bytes: int
    """The most of a step, with activations kept."""
    again_bytes: int | None
    """The same with activation checkpointing; None: the recipe rules it out."""
    host_bytes: int
    """In host memory from step to step."""


def at_every_stage(built: Built, cluster: Cluster) -> Iterator[Stage]:
    """Each choice that the recipe allows, with its own micro-batch and precision."""
    own = built.subject.recipe.engine
    for stage, offloaded in CHOICES:
        engine = {
            "library": own.library if stage == 0 else "deepspeed",
            "zero_stage": stage,
            "offload_optimizer": "optimizer" in offloaded,
            "offload_parameters": "parameters" in offloaded,
        }
        kept = rebuilt(built, cluster.ranks, **engine, activation_checkpointing=False)
        if kept is None:
            continue
        again = rebuilt(built, cluster.ranks, **engine, activation_checkpointing=True)
        device, host = states(kept, cluster.ranks)
        yield Stage(
            stage,
            offloaded,
            device.kept + device.gradients,
            step_peak(kept, cluster.ranks),
            None if again is None else step_peak(again, cluster.ranks),
            host.offloaded,
        )
