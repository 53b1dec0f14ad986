import pytest
import torch
from torch.nn import functional as F

from maskmatch_scale.method.pseudo_labels import multi_scale_probabilities, multi_scale_pseudo_labels
from maskmatch_scale.models import resample


class Convolution(torch.nn.Module):
    """A segmenter of one strided convolution that notes the sizes it is asked for."""

    def __init__(self, patch_px=1):
        super().__init__()
        self.patch_px = patch_px
        self.layer = torch.nn.Conv2d(3, 4, 5, stride=4, padding=2).double()
        self.sizes = []

    def forward(self, images):
        self.sizes.append(tuple(images.shape[-2:]))
        return self.layer(images)


def test_equals_the_formula():
    torch.manual_seed(0)
    segmenter, images = Convolution(), torch.randn(2, 3, 32, 48, dtype=torch.float64)
    labels, confidence = multi_scale_pseudo_labels(segmenter, images, (0.5, 1.0, 1.5))
    maps = []
    for size in ((16, 24), (32, 48), (48, 72)):
        resized = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        logits = F.interpolate(segmenter(resized), size=(32, 48), mode="bilinear", align_corners=False)
        maps.append(logits.softmax(1))
    mean = torch.stack(maps).mean(0)
    assert labels.equal(mean.argmax(1))
    torch.testing.assert_close(confidence, mean.max(1).values, rtol=0, atol=1e-14)
    assert labels.dtype == torch.int64
    assert not confidence.requires_grad


def test_one_scale_is_a_plain_prediction():
    torch.manual_seed(1)
    segmenter, images = Convolution(), torch.randn(1, 3, 16, 16, dtype=torch.float64)
    labels, confidence = multi_scale_pseudo_labels(segmenter, images, [1.0])
    plain = F.interpolate(segmenter(images), size=(16, 16), mode="bilinear", align_corners=False).softmax(1)
    assert labels.equal(plain.argmax(1))
    torch.testing.assert_close(confidence, plain.max(1).values, rtol=0, atol=1e-15)


@pytest.mark.parametrize("patch", [7, 8, 16])
def test_sides_are_whole_patches(patch):
    segmenter = Convolution(patch)
    multi_scale_pseudo_labels(segmenter, torch.zeros(1, 3, 6 * patch, 4 * patch, dtype=torch.float64), (0.1, 0.7, 1.3))
    assert segmenter.sizes == [(patch, patch), (4 * patch, 3 * patch), (8 * patch, 5 * patch)]


@pytest.mark.parametrize("size", [(512, 40), (512, 512)])  # logits at a quarter, and at full resolution
def test_many_bands_equal_one(size):
    logits = torch.randn(2, 7, size[0] // 4 if size[1] == 40 else size[0], size[1], dtype=torch.float64)
    labels, confidence = multi_scale_pseudo_labels(lambda _: logits, torch.zeros(2, 3, *size), [1.0])
    whole = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).softmax(1).max(1)
    assert labels.equal(whole.indices)
    torch.testing.assert_close(confidence, whole.values, rtol=0, atol=1e-15)


@pytest.mark.parametrize("stride", [1, 4])
def test_a_margin_is_labelled_and_cut_off(monkeypatch, stride):
    """Also in several bands."""
    monkeypatch.setitem(resample._CHUNK_ELEMENTS, "cpu", 4 * 2 * 30 * 7)
    torch.manual_seed(2)
    segmenter = torch.nn.Conv2d(3, 4, 5, stride=stride, padding=2).double()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    found = multi_scale_probabilities(segmenter, images, (0.5, 1.0), 9)
    assert found.size_px == (14, 30)
    assert len(list(found.bands())) == 2
    maps = []
    for size in ((16, 24), (32, 48)):
        logits = segmenter(F.interpolate(images, size=size, mode="bilinear", align_corners=False))
        maps.append(F.interpolate(logits, size=(32, 48), mode="bilinear", align_corners=False).softmax(1))
    p = torch.stack(maps).mean(0)[..., 9:-9, 9:-9]
    torch.testing.assert_close(torch.cat([rows for _, rows in found.bands()], 2), p, rtol=0, atol=1e-14)
    labels, confidence = found.labels()
    assert labels.equal(p.argmax(1))
    torch.testing.assert_close(confidence, p.max(1).values, rtol=0, atol=1e-14)


def test_halves_are_computed_in_float32():
    segmenter = torch.nn.Conv2d(3, 4, 1).bfloat16()
    _, confidence = multi_scale_pseudo_labels(segmenter, torch.randn(1, 3, 8, 8).bfloat16(), [1.0])
    assert confidence.dtype == torch.float32


def test_autocast_around_it_rounds_nothing_but_the_segmenter():
    segmenter, images = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1), torch.randn(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        labels, confidence = multi_scale_pseudo_labels(segmenter, images, (1.0, 2.0))
    assert confidence.dtype == torch.float32
    assert labels.shape == (1, 8, 8)
