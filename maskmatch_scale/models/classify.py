"""The end of SegFormer's head, from fused features to logits, in chunks of positions.

BatchNorm, ReLU, dropout and the 1×1 classifier act on each position by itself, except that BatchNorm takes two sums
over all positions. So only the features before BatchNorm are kept. Backward computes everything after them again,
dropout's draws included, one chunk at a time, while the chunk lies in the cache. A `SynchronisedBatchNorm2d` takes its
sums over the positions of all ranks, which exchange no more than a few vectors of E numbers.

Decision: docs/decisions/0016-bands-and-chunks.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from maskmatch_scale.models.resample import chunk_length, is_exported


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm that `norm_relu_classify` takes over the batch of all ranks (`batchnorm.synchronise_batchnorm`).

    Attributes:
        sum_over_ranks: gives the sum over ranks of a float vector or matrix, in the same dtype. Called in training
            only, twice in forward and once in backward. So all ranks must call the norm equally often, in the same
            order.
    """

    sum_over_ranks: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:
        """In eval mode as any BatchNorm; in training RuntimeError, since its batch would be this rank's alone."""
        if self.training:
            raise RuntimeError("a synchronised BatchNorm was called by itself; norm_relu_classify normalises for it")
        return super().forward(input)


def norm_relu_classify(rows: Tensor, norm: nn.BatchNorm2d, dropout: nn.Dropout, classifier: nn.Conv2d) -> Tensor:
    """`classifier(dropout(relu(norm(rows))))`, with the same value, gradients and running statistics.

    Args:
        rows: float (n, E), one position a row.
        norm: BatchNorm over the positions, in training or eval mode.
        dropout: elementwise.
        classifier: 1×1 convolution from E channels to K.

    Returns:
        (n, K), in the dtype of `rows`.

    Raises:
        ValueError: fewer than two positions to take statistics of, over all ranks if `norm` is synchronised.
    """
    if is_exported():
        active = dropout(F.relu(norm(rows[..., None, None])))
        return F.linear(active.flatten(1), classifier.weight.flatten(1), classifier.bias)
    with torch.autocast(rows.device.type, enabled=False):
        statistics = _batch_statistics(rows.detach(), norm) if norm.training else _running_statistics(norm)
        draws, weight = None, classifier.weight.flatten(1)
        if dropout.training and dropout.p:
            draws = _DropoutDraws.start(dropout.p)
            weight = weight / draws.keep
        assert classifier.bias is not None
        affine = norm.weight, norm.bias, weight.to(rows.dtype), classifier.bias.to(rows.dtype)
        logits: Tensor = _NormReluClassify.apply(rows, *affine, draws, statistics)
    return logits


@dataclass(frozen=True)
class _DropoutDraws:
    """Which features dropout keeps: drawn again each time they are asked for, and never stored.

    Four features share one 64-bit number, which is far quicker than one draw a feature. It rounds their probability to
    1/65536; `keep` is the rounded one.
    """

    seed: int
    dropped: int

    @classmethod
    def start(cls, p: float) -> _DropoutDraws:
        """A seed from torch's default generator."""
        return cls(int(torch.randint(2**62, ())), round(p * 2**16))

    @property
    def keep(self) -> float:
        """Probability of a feature to be kept."""
        return 1 - self.dropped / 2**16

    def chunks(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """A function that, chunk after chunk, gives for features (n, E) which of them are kept, bool (n, E)."""
        generator = torch.Generator(device).manual_seed(self.seed)

        def kept(features: Tensor) -> Tensor:
            size = features.numel()
            numbers = torch.empty(-(-size // 4), dtype=torch.int64, device=device)
            numbers.random_(-(2**63), None, generator=generator)
            return numbers.view(torch.int16)[:size].view(features.shape) >= self.dropped - 2**15

        return kept


@dataclass(frozen=True)
class _Statistics:
    """What BatchNorm normalises by, (E,) each, at least float32."""

    mean: Tensor
    inverse_deviation: Tensor
    """1 / √(variance + eps)."""
    count: int | Tensor | None = None
    """Number of rows that they were taken over, on all ranks that share them; None: they do not depend on the rows."""
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    """None: they were taken over this rank's rows alone."""

    def gradient(self, scale: Tensor, total: Tensor, along: Tensor) -> tuple[Tensor, Tensor] | None:
        """Slope and level (E,) of the part slope · x + level of dx that comes from the statistics; None if none does.

        dx = scale · (dy − Σ dy / n − (x − mean) · Σ dy (x − mean) / (n · variance)), the sums over all n rows.

        Args:
            scale: (E,), of normalised features.
            total: (E,), Σ dy of this rank.
            along: (E,), Σ dy · (x − mean) of this rank.
        """
        if self.count is None:
            return None
        if self.sum_over_ranks is not None:
            total, along = self.sum_over_ranks(torch.stack([total, along]))
        slope = -scale * self.inverse_deviation.square() * along / self.count
        return slope, -scale * total / self.count - slope * self.mean


def _running_statistics(norm: nn.BatchNorm2d) -> _Statistics:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    dtype = torch.promote_types(norm.running_mean.dtype, torch.float32)
    mean = norm.running_mean.to(dtype, copy=True)  # a later batch must not change what backward reads
    return _Statistics(mean, (norm.running_var.to(dtype) + norm.eps).rsqrt())


def _batch_statistics(rows: Tensor, norm: nn.BatchNorm2d) -> _Statistics:
    """Mean and variance over rows (n, E), and the step that running statistics take towards them."""
    sum_over_ranks = norm.sum_over_ranks if isinstance(norm, SynchronisedBatchNorm2d) else None
    count: int | Tensor = len(rows)
    # A sum in half precision stops growing as soon as it is some hundred times as large as a summand.
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    mean = torch.zeros(rows.shape[1], dtype=dtype, device=rows.device)
    for part, _ in _chunks(rows, dtype):
        mean += rows[part].sum(0, dtype=dtype)
    if sum_over_ranks is not None:
        # Ranks may have different numbers of rows.
        summed = sum_over_ranks(torch.cat([mean, mean.new_full((1,), len(rows))]))
        mean, count = summed[:-1], summed[-1]
    # A rank with two rows or more knows that there are enough. Only one with fewer reads the count, for which it waits
    # for the device. If there are too few in all, every rank reads it and raises; none is left waiting for the others.
    if len(rows) < 2 and count < 2:
        raise ValueError(f"images: {int(count)} position to normalise in training; BatchNorm needs at least 2")
    mean /= count
    squares = torch.zeros_like(mean)
    for part, (centred,) in _chunks(rows, dtype, buffers=1):
        squares += torch.sub(rows[part], mean, out=centred).square_().sum(0)
    if sum_over_ranks is not None:
        squares = sum_over_ranks(squares)
    if norm.track_running_stats and norm.running_mean is not None and norm.running_var is not None:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        share = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        for running, value in ((norm.running_mean, mean), (norm.running_var, squares / (count - 1))):
            running.lerp_(value.to(running.dtype), share)
    return _Statistics(mean, (squares / count + norm.eps).rsqrt(), count, sum_over_ranks)


class _NormReluClassify(torch.autograd.Function):
    """`norm_relu_classify` on rows (n, E), statistics and dropout's draws given."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        gain: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor,
        draws: _DropoutDraws | None,
        statistics: _Statistics,
    ) -> Tensor:
        ctx.save_for_backward(rows, gain, shift, weight)
        ctx.statistics, ctx.draws = statistics, draws
        logits = rows.new_empty(len(rows), len(weight))
        scale, offset = _affine(gain, shift, statistics)
        kept = None if draws is None else draws.chunks(rows.device)
        for part, (active,) in _chunks(rows, scale.dtype, buffers=1):
            torch.addcmul(offset, rows[part], scale, out=active).relu_()
            if kept is not None:
                active *= kept(active)
            torch.addmm(bias, active.to(weight.dtype), weight.T, out=logits[part])
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, gain, shift, weight = ctx.saved_tensors
        statistics: _Statistics = ctx.statistics
        scale, offset = _affine(gain, shift, statistics)
        kept = None if ctx.draws is None else ctx.draws.chunks(rows.device)
        grad_rows = torch.empty_like(rows)
        grad_weight = torch.zeros_like(weight, dtype=scale.dtype)
        total, along = torch.zeros_like(scale), torch.zeros_like(scale)  # Σ dy, Σ dy · (x − mean)
        for part, (active, passed) in _chunks(rows, scale.dtype, buffers=2):
            torch.addcmul(offset, rows[part], scale, out=active).relu_()
            if kept is not None:
                active *= kept(active)
            grad_weight += gradient[part].T @ active.to(gradient.dtype)
            passed.copy_(gradient[part] @ weight)
            # No gradient passes where ReLU or dropout set a feature to zero.
            torch.ops.aten.threshold_backward.grad_input(passed, active, 0, grad_input=passed)
            grad_rows[part] = passed
            total += passed.sum(0)
            along += passed.mul_(torch.sub(rows[part], statistics.mean, out=active)).sum(0)
        line = statistics.gradient(scale, total, along)
        for part, (own,) in _chunks(rows, scale.dtype, buffers=1):
            torch.mul(grad_rows[part], scale, out=own)
            if line is not None:
                own.addcmul_(rows[part], line[0]).add_(line[1])
            grad_rows[part] = own
        # Gradients of parameters are this rank's own sums, as in torch's SyncBatchNorm. The engine adds them up.
        grad_gain, grad_shift = (along * statistics.inverse_deviation).to(gain.dtype), total.to(shift.dtype)
        return grad_rows, grad_gain, grad_shift, grad_weight.to(weight.dtype), gradient.sum(0), None, None


def _affine(gain: Tensor, shift: Tensor, statistics: _Statistics) -> tuple[Tensor, Tensor]:
    """Scale and offset (E,) of normalised features."""
    scale = gain * statistics.inverse_deviation
    return scale, shift - scale * statistics.mean


def _chunks(rows: Tensor, dtype: torch.dtype, buffers: int = 0) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of rows (n, E), each with buffers of its shape; all buffers use the same memory."""
    length = chunk_length(rows.shape[1], rows.device)
    memory = torch.empty(buffers, min(length, len(rows)), rows.shape[1], dtype=dtype, device=rows.device)
    for start in range(0, len(rows), length):
        part = slice(start, min(start + length, len(rows)))
        yield part, list(memory[:, : part.stop - part.start])
