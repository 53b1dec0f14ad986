"""Measures this machine for plans (`maskmatch plan --measure FILE`): operators of a step, one after the other.

On its GPU, or else on the cores of one rank. It takes a minute or two on a core.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from maskmatch_scale.planning.efficiency import ADAMW_BYTES
from maskmatch_scale.planning.measured import ADAMW, COPY, MeasuredGpu, Point, key_of
from maskmatch_scale.planning.recorder import Recorder

_aten = torch.ops.aten
_SIZES = (2**14, 2**18, 2**21, 2**24)
"""Elements of what elementwise operators are given: in every cache, and in none."""
_ROUND_S = 0.03
_ROUNDS = 3
"""An operator is repeated for so long, so often; the fastest round counts."""

Case = Callable[[], Any]
"""One call of an operator."""


def measure(device: torch.device | None = None) -> MeasuredGpu:
    """Measure a device.

    Args:
        device: None: the first GPU, or the CPU with the threads that torch uses now.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    points: list[Point] = []
    for run in _cases(device):
        with torch.no_grad(), Recorder() as recorder:
            run()
        [operation] = recorder.operations[-1:]
        points.append(
            Point(
                key_of(operation),
                str(operation.dtype).removeprefix("torch."),
                operation.flops,
                operation.bytes,
                _seconds(run, device),
            )
        )
    points += list(_adamw(device))
    cuda = device.type == "cuda"
    small = min(point.seconds for point in points if point.name == COPY)
    fastest = {dtype: _fastest(points, dtype) for dtype in ("float32", "bfloat16")}
    largest = max((point for point in points if point.name == COPY), key=lambda point: point.bytes)
    return MeasuredGpu(
        name=torch.cuda.get_device_name(device) if cuda else "cpu",
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if cuda else _host_memory(),
        fp32_flops=fastest["float32"],
        half_flops=fastest["bfloat16"],
        bandwidth=largest.bytes / largest.seconds,
        launch_s=_launch_s(device) if cuda else small,
        source=f"measured, torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads",
        points=tuple(points),
        is_cuda=cuda,
    )


def _fastest(points: list[Point], dtype: str) -> float:
    return max((p.flops / p.seconds for p in points if p.flops and p.dtype == dtype), default=1.0)


def _cases(device: torch.device) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        yield from _products(device, dtype)
        yield from _convolutions(device, dtype)
        yield from _moves(device, dtype)


def _products(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    for rows, inner, columns in ((64, 64, 64), (256, 192, 192), (1024, 384, 384), (1024, 384, 1536), (2048, 768, 3072)):
        a, b = _random(device, dtype, rows, inner), _random(device, dtype, inner, columns)
        yield partial(_aten.mm, a, b)
        yield partial(_aten.addmm, _random(device, dtype, columns), a, b)
    for batch, rows, inner in ((8, 16, 32), (8, 256, 64), (16, 1024, 64)):
        a, b = _random(device, dtype, batch, rows, inner), _random(device, dtype, batch, inner, rows)
        yield partial(_aten.bmm, a, b)
    if device.type != "cpu":
        return
    for heads, queries, keys in ((6, 64, 64), (6, 256, 256), (6, 1024, 1024), (2, 4096, 256)):
        q, k = _random(device, dtype, 1, heads, queries, 64), _random(device, dtype, 1, heads, keys, 64)
        forward = _aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = forward(q, k, k)
        yield partial(forward, q, k, k)
        backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward
        yield partial(backward, q, q, k, k, out, lse, 0.0, False)


def _convolutions(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    shapes = (  # images, channels in, side, channels out, kernel, stride, padding, groups
        *((1, 3, 128, 192, 16, 16, 0, 1), (2, 3, 512, 384, 16, 16, 0, 1)),
        *((1, 64, 32, 64, 3, 1, 1, 1), (1, 64, 128, 128, 3, 2, 1, 1), (1, 256, 64, 256, 3, 1, 1, 1)),
        *((1, 256, 16, 256, 3, 1, 1, 256), (1, 256, 64, 256, 3, 1, 1, 256), (2, 256, 128, 256, 3, 1, 1, 256)),
    )
    for images, inner, side, outer, kernel, stride, padding, groups in shapes:
        x = _random(device, dtype, images, inner, side, side).contiguous(memory_format=torch.channels_last)
        weight, bias = _random(device, dtype, outer, inner // groups, kernel, kernel), _random(device, dtype, outer)
        how = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups)
        y = _aten.convolution(x, weight, bias, *how)
        yield partial(_aten.convolution, x, weight, bias, *how)
        yield partial(_aten.convolution_backward, y, x, weight, [outer], *how, [inner != 3, True, True])


def _moves(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Operators that read and write, of rows of 384 channels where it matters."""
    channels, eps = 384, 1e-6
    for size in _SIZES:
        rows = max(1, size // channels)
        x, y = _random(device, dtype, rows, channels), _random(device, dtype, rows, channels)
        weight = _random(device, dtype, channels)
        index = torch.randperm(rows, device=device)
        columns = torch.randint(channels, (rows, channels), device=device)
        labels = torch.randint(channels, (rows,), device=device)
        _, mean, scale = _aten.native_layer_norm(x, [channels], weight, weight, eps)
        soft = _aten._softmax(x, -1, False)
        side = max(2, math.isqrt(size // 32) // 2)
        grid, large = _random(device, dtype, 1, 32, side, side), _random(device, dtype, 1, 32, 2 * side, 2 * side)
        yield partial(_aten._to_copy, x, dtype=torch.float32 if dtype != torch.float32 else torch.bfloat16)
        for alone in (_aten.clone, _aten.exp, _aten.relu, _aten.gelu, _aten.silu):
            yield partial(alone, x)
        for both in (_aten.add, _aten.mul, _aten.sub):
            yield partial(both, x, y)
        for listed in (_aten.cat, _aten.stack):
            yield partial(listed, [x, y])
        for softmax in (_aten._softmax, _aten._log_softmax):
            yield partial(softmax, x, -1, False)
        for backward in (_aten._softmax_backward_data, _aten._log_softmax_backward_data):
            yield partial(backward, x, soft, -1, x.dtype)
        yield partial(_aten.div, x, 2.0)
        yield partial(_aten.sum, x, [0])
        yield partial(_aten.mean, x, [-1])
        yield partial(_aten.gelu_backward, y, x)
        yield partial(_aten.native_layer_norm, x, [channels], weight, weight, eps)
        needs = [True, True, True]
        yield partial(_aten.native_layer_norm_backward, y, x, [channels], mean, scale, weight, weight, needs)
        yield partial(_aten.index_select, x, 0, index)
        yield partial(_aten.index, x, [index])
        yield partial(_aten.index_add, x, 0, index, y)
        yield partial(_aten.gather, x, 1, columns)
        yield partial(_aten.max, x, 1)
        yield partial(_aten.clamp, x, 0, 1)
        yield partial(_aten.where, x > 0, x, y)
        yield partial(_aten.lerp, x, y, 0.5)
        yield partial(_aten.upsample_bilinear2d, grid, [2 * side] * 2, False)
        yield partial(_aten.upsample_bilinear2d_backward, large, [2 * side] * 2, list(grid.shape), False)
        yield partial(_aten.nll_loss_forward, soft, labels, None, 2, -100)


def _adamw(device: torch.device) -> Iterator[Point]:
    """Of parameters like those of a ViT's blocks: a step of AdamW as training takes it."""
    for blocks in (1, 8):
        shapes = ((1152, 384), (1152,), (384, 384), (384,), (1536, 384), (1536,), (384, 1536), (384,)) * blocks
        parameters = [torch.nn.Parameter(_random(device, torch.float32, *shape)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.AdamW(parameters, fused=device.type == "cuda" or None)
        taken = _seconds(optimizer.step, device)
        moved = int(ADAMW_BYTES * sum(parameter.numel() for parameter in parameters))
        yield Point(ADAMW, "float32", 0, moved, taken)


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.rand(shape, device=device).to(dtype)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of one call, in the fastest round: on a CPU of the process's own time, which other processes do not take from."""
    with torch.no_grad():
        run()
        taken = _round(run, 1, device)
        repeats = max(1, int(_ROUND_S / max(taken, 1e-7)))
        return min(_round(run, repeats, device) for _ in range(_ROUNDS)) / repeats


def _round(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    clock = time.perf_counter if cuda else time.process_time
    begin = clock()
    for _ in range(repeats):
        run()
    if cuda:
        torch.cuda.synchronize(device)
    return clock() - begin


def _launch_s(device: torch.device) -> float:
    """Of the host: an operator with its backward pass on a tensor for which the device needs no time."""
    x = torch.ones(8, device=device, requires_grad=True)

    def chain() -> None:
        y = x
        for _ in range(100):
            y = y * 2
        torch.autograd.backward(y.sum())

    with torch.enable_grad():
        chain()
        return min(_round(chain, 1, device) for _ in range(_ROUNDS)) / 200


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
