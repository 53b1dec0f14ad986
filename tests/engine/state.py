"""A small model under any engine, steps of it, and its state kept whole: what tests of continuing share.

Not tests themselves; `tests/distributed/state_jobs.py` uses it on two ranks.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from maskmatch_scale.engine.build import build_engine
from maskmatch_scale.engine.ema import build_teacher

BATCH = 8


class Toy(nn.Module):
    """Student and step in one. Its sizes do not divide among ranks, and one parameter is smaller than two ranks.

    It has frozen parameters, floating and integer buffers, a buffer that is not in the `state_dict`, and a context
    decoder that the first two steps do not use.
    """

    deferred = None

    def __init__(self, *, thawed=False):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
        self.backbone[0].requires_grad_(thawed)
        self.head, self.context = nn.Linear(3, 2), nn.Linear(3, 2)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fixed", torch.ones(3), persistent=False)
        self.mean_of = None

    def features(self, inputs):
        features = self.backbone(inputs.to(self.backbone[2].bias.dtype))
        if self.training:
            self.mean.lerp_(self.mean_of(features.detach().to(self.mean.dtype)), 0.1)
            self.seen += 1
        return features - self.mean.to(features.dtype) * self.fixed.to(features.dtype)

    def forward(self, inputs, targets, context):
        logits = self.head(self.features(inputs)) * self.scale
        if context:
            logits = logits + self.context(self.features(inputs))
        loss = (logits.float() - targets).square().mean()
        return loss, loss.detach()[None]


class Stored:
    """`StoredState` of the pieces of all ranks, which must have every element once. Counts what is read."""

    def __init__(self, pieces):
        found = {}
        for piece in pieces:
            found.setdefault(piece.name, []).append(piece)
        self.whole = {name: _whole(name, parts) for name, parts in found.items()}
        self.elements_read = {}

    def names(self):
        return self.whole.keys()

    def shape(self, name):
        return tuple(self.whole[name].shape)

    def read(self, name, start=0, stop=None):
        values = self.whole[name].flatten()[start:stop]
        self.elements_read[name] = self.elements_read.get(name, 0) + len(values)
        return values


def apart(found, expected, of=None):
    """Names of tensors that differ between two states, of those named or of all."""
    names = {*found, *expected} if of is None else set(of)
    return [n for n in names if n not in found or n not in expected or not found[n].equal(expected[n])]


def _whole(name, parts):
    shape = parts[0].shape
    whole = torch.empty(math.prod(shape), dtype=parts[0].values.dtype)
    covered = torch.zeros(math.prod(shape), dtype=torch.int64)
    for part in parts:
        assert part.shape == shape, name
        assert part.values.dim() == 1, name
        assert len(part.values), name
        whole[part.start : part.start + len(part.values)] = part.values.detach().cpu()
        covered[part.start : part.start + len(part.values)] += 1
    assert (covered == 1).all(), f"{name}: covered {covered.tolist()} times"
    return whole.view(shape)


class Job:
    """The toy under an engine, with its teacher. The recipe says whether its running mean is that of all ranks."""

    def __init__(self, recipe, runtime, *, thawed=False):
        self.runtime, self.module = runtime, Toy(thawed=thawed)
        average = copy.deepcopy(self.module)
        average.forward = lambda inputs: average.head(average.features(inputs))
        self.module.mean_of = self._own_mean if recipe.model.batchnorm == "per_rank" else self._mean_over_ranks
        self.engine = build_engine(self.module, self.module, recipe, runtime)
        self.teacher = build_teacher(average, self.engine)

    @staticmethod
    def _own_mean(features):
        return features.mean(0)

    def _mean_over_ranks(self, features):
        return self.runtime.sum_over_ranks(features.sum(0)) / BATCH

    def train(self, first, steps):
        """Losses of steps ``first`` to ``first + steps``, of the global batch, and the teacher's logits after each."""
        losses = []
        for number in range(first, first + steps):
            self.module.train()
            rows = BATCH // self.runtime.world_size
            mine = slice(rows * self.runtime.rank, rows * (self.runtime.rank + 1))
            draw = torch.Generator().manual_seed(100 + number)
            inputs, targets = torch.randn(BATCH, 5, generator=draw), torch.randn(BATCH, 2, generator=draw)
            figures = self.engine.accumulate(inputs[mine], targets[mine], number >= 2, last=True)
            self.engine.step(number)
            if not self.engine.skipped:
                self.teacher.update(0.7)
            losses.append(float(self.runtime.sum_over_ranks(figures)[0]) / self.runtime.world_size)
        return losses

    def logits(self):
        return self.teacher(torch.linspace(-1, 1, 15).view(3, 5)).clone()

    def pieces(self):
        """Copies of this rank's pieces."""
        both = (*self.engine.pieces(), *self.teacher.pieces())
        return [type(piece)(piece.name, piece.shape, piece.start, piece.values.clone()) for piece in both]

    def restore(self, stored, progress):
        self.engine.restore(stored, progress)
        self.teacher.restore(stored)
