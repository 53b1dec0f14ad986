"""Guards against silent traps, each with a way to take it away for one run.

Every entry leaves a run that ends without an error, and wrong: the test of it demands that the result differs from the
reference by far more than a sound run does. One that passes without its guard shows that the guard is not needed.
"""

import contextlib
from unittest import mock

from maskmatch_scale.engine import gathering, zero


def _clipping_default():
    """DeepSpeed clips to norm 1 where its JSON does not say otherwise."""
    plain = zero.deepspeed_config

    def config(recipe, world_size):
        made = plain(recipe, world_size)
        del made["gradient_clipping"]
        return made

    return mock.patch.object(zero, "deepspeed_config", config)


def _step_after_each_backward():
    """DeepSpeed counts micro-batches in step(): without the calls between, the real one does nothing."""

    def backward(self, loss):
        self._order.backward()
        self._engine.backward(loss)

    return mock.patch.object(zero.ZeroEngine, "backward", backward)


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
            masters = [zero.full_fp32(parameter) for parameter in self.student.parameters()]
            for average, master in zip(averages, masters, strict=True):
                average.copy_(average.bfloat16().lerp(master.bfloat16(), 1 - decay))

        return update

    return mock.patch.object(zero.ZeroEngine, "averager", averager)


@contextlib.contextmanager
def _refusal():
    """ZeRO-0 with bf16 weights, which the recipe refuses: DeepSpeed takes a hidden optimizer step.

    The average's own search for fp32 masters finds none there, and must look the other way.
    """
    from maskmatch_scale.recipe import sections

    def weights(parameter):
        return parameter.detach().float()

    with (
        mock.patch.object(sections, "unsound", return_value=iter(())),
        mock.patch.object(zero, "full_fp32", weights),
    ):
        yield


def _one_backward():
    """One summed loss and one backward for all views; here one backward a part, then one step."""

    def backward(self, loss):
        last = self._order.backward()
        for part in (0.5, 0.25, 0.25):
            self._engine.backward(loss * part, retain_graph=True)
        if not last:
            self._engine.step()

    return mock.patch.object(zero.ZeroEngine, "backward", backward)


GUARDS = {
    "clipping-default": _clipping_default,
    "step-after-each-backward": _step_after_each_backward,
    "teacher-released": _teacher_released,
    "average-of-masters": _average_of_masters,
    "average-in-fp32": _average_in_fp32,
    "refusal": _refusal,
    "one-backward": _one_backward,
}


@contextlib.contextmanager
def without(name):
    """Take one guard away."""
    with GUARDS[name]():
        yield
