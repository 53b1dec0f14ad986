"""The end of SegFormer's head, from fused features to logits, in chunks of positions.

BatchNorm, ReLU, dropout and the 1×1 classifier act on each position by itself, but for the two sums over all positions
in BatchNorm. So only the features before them are kept; all that comes after, dropout's draws among it, is computed
again in backward, a chunk at a time, while it lies in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from maskmatch_scale.models.resample import chunk_length


def norm_relu_classify(rows: Tensor, norm: nn.BatchNorm2d, dropout: nn.Dropout, classifier: nn.Conv2d) -> Tensor:
    """`classifier(dropout(relu(norm(rows))))`: the same value, gradients and running statistics.

    Args:
        rows: float (n, E), a position a row.
        norm: BatchNorm over the positions, in whatever mode it is.
        dropout: elementwise.
        classifier: 1×1 convolution from E channels to K.

    Returns:
        (n, K), in the dtype of `rows`.
    """
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
    """Which features dropout keeps, drawn again whenever asked instead of stored.

    Four features share one 64-bit number, so their probability is rounded to 1/65536: far quicker than one
    draw a feature. `keep` is the rounded one.
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
    """What BatchNorm normalises by, (E,) each, in the dtype of its own parameters."""

    mean: Tensor
    inverse_deviation: Tensor
    """1 / √(variance + eps)."""
    of_batch: bool
    """Whether they depend on the features, so that gradients go through them."""


def _running_statistics(norm: nn.BatchNorm2d) -> _Statistics:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean.clone(), norm.running_var
    return _Statistics(mean, (variance + norm.eps).rsqrt(), of_batch=False)


def _batch_statistics(rows: Tensor, norm: nn.BatchNorm2d) -> _Statistics:
    """Mean and variance over rows (n, E), and the step that running statistics take towards them."""
    count = len(rows)
    if count < 2:
        raise ValueError(f"images: {count} position to normalise in training; BatchNorm needs at least 2")
    mean = torch.zeros(rows.shape[1], dtype=norm.weight.dtype, device=rows.device)
    for part, _ in _chunks(rows, mean.dtype):
        mean += rows[part].sum(0, dtype=mean.dtype)
    mean /= count
    squares = torch.zeros_like(mean)
    for part, (centred,) in _chunks(rows, mean.dtype, buffers=1):
        squares += torch.sub(rows[part], mean, out=centred).square_().sum(0)
    if norm.track_running_stats and norm.running_mean is not None and norm.running_var is not None:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        share = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        for running, value in ((norm.running_mean, mean), (norm.running_var, squares / (count - 1))):
            running.lerp_(value.to(running.dtype), share)
    return _Statistics(mean, (squares / count + norm.eps).rsqrt(), of_batch=True)


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
            # What ReLU or dropout set to zero lets no gradient through.
            torch.ops.aten.threshold_backward.grad_input(passed, active, 0, grad_input=passed)
            grad_rows[part] = passed
            total += passed.sum(0)
            along += passed.mul_(torch.sub(rows[part], statistics.mean, out=active)).sum(0)
        # dx = scale · (dy − Σ dy / n − (x − mean) · Σ dy (x − mean) / (n · variance)), the sums for a batch's own mean.
        slope = -scale * statistics.inverse_deviation.square() * along / len(rows)
        level = -scale * total / len(rows) - slope * statistics.mean
        for part, (own,) in _chunks(rows, scale.dtype, buffers=1):
            torch.mul(grad_rows[part], scale, out=own)
            if statistics.of_batch:
                own.addcmul_(rows[part], slope).add_(level)
            grad_rows[part] = own
        grad_gain = along * statistics.inverse_deviation
        return grad_rows, grad_gain, total, grad_weight.to(weight.dtype), gradient.sum(0), None, None


def _affine(gain: Tensor, shift: Tensor, statistics: _Statistics) -> tuple[Tensor, Tensor]:
    """Scale and offset (E,) of normalised features."""
    scale = gain * statistics.inverse_deviation
    return scale, shift - scale * statistics.mean


def _chunks(rows: Tensor, dtype: torch.dtype, buffers: int = 0) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of rows (n, E), each with buffers of its shape, the same memory every time."""
    length = chunk_length(rows.shape[1], rows.device)
    memory = torch.empty(buffers, min(length, len(rows)), rows.shape[1], dtype=dtype, device=rows.device)
    for start in range(0, len(rows), length):
        part = slice(start, min(start + length, len(rows)))
        yield part, list(memory[:, : part.stop - part.start])
