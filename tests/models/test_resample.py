"""Upsampling in bands equals `F.interpolate`, and the chunked end of SegFormer's head equals its modules."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from maskmatch_scale.models import classify, resample
from maskmatch_scale.models.classify import norm_relu_classify
from maskmatch_scale.models.resample import upsampled_sum, upsampling_bands

sides = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(source=st.integers(1, 40), factor=st.floats(1, 9), rows=st.integers(1, 50), margin=st.integers(0, 30))
def test_bands_are_interpolation(source, factor, rows, margin):
    output = round(source * factor)
    margin = min(margin, (output - 1) // 2)
    kept = output - 2 * margin
    values = torch.randn(source, dtype=torch.float64)
    found = torch.full((kept,), torch.nan, dtype=torch.float64)
    for band in upsampling_bands(source, kept, rows, torch.float64, torch.device("cpu"), margin):
        assert len(found[band.output]) <= rows
        found[band.output] = band.weight @ values[band.source]
    whole = F.interpolate(values[None, None, :, None], size=(output, 1), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, whole.flatten()[margin : margin + kept], rtol=0, atol=1e-13)


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 3), first=sides, coarse=st.lists(sides, min_size=1, max_size=3), together=st.booleans())
def test_upsampled_sum_and_its_gradients(batch, first, coarse, together):
    """Also with all images together, as off the CPU."""
    with mock.patch.object(resample, "_IMAGES_AT_ONCE", {} if together else {"cpu": 1}):
        sizes = [(max(h for h, _ in [first, *coarse]) * 2, max(w for _, w in [first, *coarse]) + 3), *coarse]
        levels = [torch.randn(batch * h * w, 5, dtype=torch.float64, requires_grad=True) for h, w in sizes]
        total = upsampled_sum([level * 1 for level in levels], sizes)
        maps = [level.view(batch, h, w, 5).permute(0, 3, 1, 2) for level, (h, w) in zip(levels, sizes)]
        expected = sum(F.interpolate(m, size=sizes[0], mode="bilinear", align_corners=False) for m in maps)
        expected = expected.permute(0, 2, 3, 1).reshape(-1, 5)
        torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)
        weight = torch.randn_like(total)
        ours = torch.autograd.grad((total * weight).sum(), levels, retain_graph=True)
        theirs = torch.autograd.grad((expected * weight).sum(), levels)
        for own, want in zip(ours, theirs):
            torch.testing.assert_close(own, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracking", [True, False])
@pytest.mark.parametrize("length", [7, 10**9])
def test_end_of_the_head_equals_its_modules(monkeypatch, training, momentum, tracking, length):
    monkeypatch.setattr(classify, "chunk_length", lambda *_: length)
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6, momentum=momentum).double().train(training)
    norm.track_running_stats = tracking
    classifier = nn.Conv2d(6, 4, 1).double()
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.running_mean):
            values.add_(torch.randn_like(values))
        norm.running_var.add_(torch.rand_like(norm.running_var))
    other_norm, other_classifier = copy.deepcopy(norm), copy.deepcopy(classifier)
    rows = (100 + torch.randn(30, 6, dtype=torch.float64)).requires_grad_()
    same = rows.detach().clone().requires_grad_()
    weight = torch.randn(30, 4, dtype=torch.float64)
    for _ in range(2):  # twice: running statistics go on
        logits = norm_relu_classify(rows, norm, nn.Dropout(0.0), classifier)
        maps = same.T.view(1, 6, 5, 6)
        expected = other_classifier(F.relu(other_norm(maps))).flatten(2)[0].T
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
        (logits * weight).sum().backward()
        (expected * weight).sum().backward()
    pairs = [(rows.grad, same.grad)]
    for own, want in ((norm, other_norm), (classifier, other_classifier)):
        pairs += [(a.grad, b.grad) for a, b in zip(own.parameters(), want.parameters(), strict=True)]
        pairs += list(zip(own.buffers(), want.buffers(), strict=True))
    for own, want in pairs:
        torch.testing.assert_close(own, want, rtol=1e-9, atol=1e-9)


def test_dropout_keeps_its_share_and_backward_draws_the_same():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8).double().eval()
    classifier = nn.Conv2d(8, 8, 1, bias=True).double()
    with torch.no_grad():  # the classifier passes features through, so that logits show what was kept
        classifier.weight.copy_(torch.eye(8)[..., None, None])
        classifier.bias.zero_()
    rows = (torch.rand(20_000, 8, dtype=torch.float64) + 1).requires_grad_()
    dropout = nn.Dropout(0.1).train()
    logits = norm_relu_classify(rows, norm, dropout, classifier)
    kept = logits != 0
    assert kept.double().mean() == pytest.approx(0.9, abs=0.004)  # 5 standard deviations
    torch.testing.assert_close(logits[kept] / rows[kept], torch.full_like(rows[kept], 1 / 0.9), rtol=1e-3, atol=0)
    logits.sum().backward()
    assert (rows.grad != 0).equal(kept)
    again = norm_relu_classify(rows, norm, dropout, classifier)
    assert not (again != 0).equal(kept)  # another call draws anew
    torch.manual_seed(1)
    first = norm_relu_classify(rows, norm, dropout, classifier)
    torch.manual_seed(1)
    assert norm_relu_classify(rows, norm, dropout, classifier).equal(first)


def test_a_single_position_cannot_be_normalised():
    with pytest.raises(ValueError, match="at least 2"):
        norm_relu_classify(torch.ones(1, 4), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 2, 1))
