"""Losses in bands against the plain formulas, in value, gradient and memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from maskmatch_scale.method.losses import IGNORED, cross_entropy_sum, squared_error_sum
from maskmatch_scale.method.pseudo_labels import Probabilities
from maskmatch_scale.method.views import Neighbour, cutmix_of


def plain(logits, target, pixels, class_weight=None):
    up = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(
        up, target.masked_fill(~pixels, IGNORED), class_weight, ignore_index=IGNORED, reduction="sum"
    )


def problem(batch, classes, source, size, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, classes, *source, dtype=dtype, generator=draw)
    target = torch.randint(classes, (batch, *size), generator=draw)
    pixels = torch.rand(batch, *size, generator=draw) < 0.7
    return logits, target, pixels


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 3),
    classes=st.integers(2, 7),
    source=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    factor=st.tuples(st.floats(1, 7), st.floats(1, 7)),
    weighted=st.booleans(),
    channels_last=st.booleans(),
)
def test_value_and_gradient_equal_the_plain_formula(batch, classes, source, factor, weighted, channels_last):
    size = (round(source[0] * factor[0]), round(source[1] * factor[1]))
    logits, target, pixels = problem(batch, classes, source, size)
    weight = torch.rand(classes, dtype=torch.float64) + 0.1 if weighted else None
    memory = torch.channels_last if channels_last else torch.contiguous_format
    ours = logits.clone(memory_format=memory).requires_grad_()
    theirs = logits.clone().requires_grad_()
    loss, expected = cross_entropy_sum(ours, target, pixels, weight), plain(theirs, target, pixels, weight)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (0.3 * loss).backward()
    (0.3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("source", [(128, 128), (512, 512), (37, 301)])
def test_many_bands(source):
    logits, target, pixels = problem(2, 5, source, (512, 512))
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss, expected = cross_entropy_sum(ours, target, pixels), plain(theirs, target, pixels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_halves_are_summed_in_float32():
    logits, target, pixels = problem(1, 4, (8, 8), (32, 32), dtype=torch.float32)
    half = logits.bfloat16().requires_grad_()
    loss = cross_entropy_sum(half, target, pixels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain(logits.bfloat16().float(), target, pixels), rtol=1e-5, atol=0)
    loss.backward()
    assert half.grad.dtype == torch.bfloat16


def test_no_pixel_counts():
    logits, target, pixels = problem(1, 3, (4, 4), (16, 16))
    logits.requires_grad_()
    loss = cross_entropy_sum(logits, target, torch.zeros_like(pixels))
    loss.backward()
    assert loss == 0
    assert logits.grad.eq(0).all()


def peak_bytes(run):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = most = 0
    events = profiler.profiler.kineto_results.events()
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += change
        most = max(most, now)
    return most


def test_memory_does_not_grow_with_classes_times_pixels():
    """Full-resolution logits of 40 classes at 512 px are 42 MB; the plain formula holds several such."""
    logits, target, pixels = problem(1, 40, (64, 64), (512, 512), dtype=torch.float32)
    logits.requires_grad_()
    whole = 40 * 512 * 512 * 4
    assert peak_bytes(lambda: plain(logits, target, pixels).backward()) > 2 * whole
    assert peak_bytes(lambda: cross_entropy_sum(logits, target, pixels).backward()) < 0.35 * whole


def probabilities_of(shape, size, scales=2, seed=1, dtype=torch.float64):
    """Of several scales, and whole ones by the formula."""
    draw = torch.Generator().manual_seed(seed)
    batch, classes, height, width = shape
    logits = tuple(
        3 * torch.randn(batch, classes, height + scale, width + 2 * scale, dtype=dtype, generator=draw)
        for scale in range(scales)
    )
    up = [F.interpolate(own, size=size, mode="bilinear", align_corners=False).softmax(1) for own in logits]
    return Probabilities(logits, size), torch.stack(up).mean(0)


@pytest.mark.parametrize("size", [(512, 40), (37, 301), (24, 24)])
@pytest.mark.parametrize("neighbour", [False, True])
def test_squared_error_equals_the_plain_formula(size, neighbour):
    logits, _, pixels = problem(3, 5, (24, 24), size)
    target, whole = probabilities_of((3, 5, 20, 30), size)
    # Boxes of all three; with a neighbour the last image's partner is on another rank, without it is the first.
    boxes = torch.tensor([[0, 0, 20, 24], [3, 3, 19, 17], [10, 0, size[0], 12]])
    others, whole_others = probabilities_of((1, 5, 20, 30), size, seed=2)
    fetched = iter(own[0] for own in others.logits)
    partner = Neighbour(True, lambda first, last: next(fetched)) if neighbour else None
    cutmix = cutmix_of(boxes, size, partner)
    shown = [whole[1], whole[0], whole_others[0] if neighbour else whole[0]]
    expected_target = torch.where(cutmix.inside[:, None], torch.stack(shown), whole)

    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = squared_error_sum(ours, target.mixed(cutmix), pixels)
    student = F.interpolate(theirs, size=size, mode="bilinear", align_corners=False).softmax(1)
    expected = ((student - expected_target) ** 2).sum(1)[pixels].sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (0.3 * loss).backward()
    (0.3 * expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-13)


def test_squared_error_under_autocast_is_float32():
    logits = torch.randn(1, 4, 8, 8).bfloat16().requires_grad_()
    target, _ = probabilities_of((1, 4, 8, 8), (32, 32), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = squared_error_sum(logits, target, torch.ones(1, 32, 32, dtype=torch.bool))
    assert loss.dtype == torch.float32
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16


def test_squared_error_keeps_no_whole_probabilities():
    logits, _, pixels = problem(2, 40, (64, 64), (512, 512), dtype=torch.float32)
    logits.requires_grad_()
    small, _ = probabilities_of((2, 40, 64, 64), (64, 64), dtype=torch.float32)
    target = Probabilities(small.logits, (512, 512))
    cutmix = cutmix_of(torch.tensor([[0, 0, 300, 300], [9, 9, 400, 80]]), (512, 512))
    whole = 2 * 40 * 512 * 512 * 4
    assert peak_bytes(lambda: squared_error_sum(logits, target.mixed(cutmix), pixels).backward()) < 0.35 * whole
