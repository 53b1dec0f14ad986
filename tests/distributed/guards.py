"""Guards against silent traps, each with a way to take it away for one run.

Every entry leaves a run that ends without an error, and wrong: the test of it demands that the result differs from the
reference by far more than a sound run does. One that passes without its guard shows that the guard is not needed.
"""

import contextlib
from unittest import mock

import torch

from maskmatch_scale.engine import gathering, zero


def _clipping_default():
    """DeepSpeed clips to norm 1 where its JSON does not say otherwise."""
    plain = zero.deepspeed_config

    def config(recipe, world_size):
        made = plain(recipe, world_size)
        del made["gradient_clipping"]
        return made

    return mock.patch.object(zero, "deepspeed_config", config)


def _unmanaged():
    """DeepSpeed takes the backward pass that it counted to for the last of a step, unless it is told not to count."""
    plain = zero.deepspeed_config

    def config(recipe, world_size):
        return plain(recipe, world_size) | {"managed_gradient_accumulation": True}

    return mock.patch.object(zero, "deepspeed_config", config)


def _masked_view_first():
    """A gradient that the first backward pass of a step does not reach is added to that of the step before."""
    return mock.patch.object(zero.ZeroEngine, "every_gradient_first", False)


def _teacher_released():
    """What a sharded teacher has gathered is forgotten before its shards change."""

    @contextlib.contextmanager
    def kept(self):
        self._most_kept = self._max_live
        yield

    return mock.patch.object(gathering.Gathering, "kept", kept)


def _average_of_masters():
    """The average must be taken of fp32 masters: bf16 copies have lost what a step changes."""

    def averager(self, averages):
        def update(decay):
            for average, parameter in zip(averages, self.student.parameters(), strict=True):
                average.lerp_(parameter.float(), 1 - decay)

        return update

    return mock.patch.object(zero.ZeroEngine, "averager", averager)


def _average_in_fp32():
    """And in fp32: a bf16 average stands still at a decay near 1."""

    def averager(self, averages):
        def update(decay):
            masters = [parameter.detach() for parameter in self.student.parameters()]
            for average, master in zip(averages, masters, strict=True):
                average.copy_(average.bfloat16().lerp(master.bfloat16(), 1 - decay))

        return update

    return mock.patch.object(zero.ZeroEngine, "averager", averager)


@contextlib.contextmanager
def _refusal():
    """ZeRO-0 with bf16 weights, which the recipe refuses: DeepSpeed takes a hidden optimizer step.

    It refuses gradients added in fp32 there, but not those that a DeepSpeed JSON makes bf16. The average's own search
    for fp32 masters finds none there, and must look the other way.
    """
    from maskmatch_scale.recipe import sections

    plain = zero.deepspeed_config

    def config(recipe, world_size):
        return plain(recipe, world_size) | {"data_types": {}}

    def averager(self, averages):
        students = list(self.student.parameters())
        return lambda decay: torch._foreach_lerp_(list(averages), [p.detach().float() for p in students], 1 - decay)

    with (
        mock.patch.object(sections, "unsound", return_value=iter(())),
        mock.patch.object(zero.ZeroEngine, "averager", averager),
        mock.patch.object(zero, "deepspeed_config", config),
    ):
        yield


GUARDS = {
    "clipping-default": _clipping_default,
    "unmanaged": _unmanaged,
    "masked-view-first": _masked_view_first,
    "teacher-released": _teacher_released,
    "average-of-masters": _average_of_masters,
    "average-in-fp32": _average_in_fp32,
    "refusal": _refusal,
}


@contextlib.contextmanager
def without(name):
    """Take one guard away."""
    with GUARDS[name]():
        yield
