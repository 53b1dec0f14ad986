"""The weak view keeps image and label together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskmatch_scale.data.batches.augment import WeakView, rare_class_pixel


def labelled_image(height, width):
    """An image whose value is 20 × its label, smooth in nothing: misalignment shows at once."""
    label = (torch.arange(height)[:, None] // 16 + torch.arange(width) // 16) % 10
    return (label * 20).to(torch.uint8).expand(3, -1, -1).contiguous(), label.to(torch.uint8)


@settings(max_examples=40, deadline=None)
@given(
    size=st.tuples(st.integers(20, 150), st.integers(20, 150)),
    crop=st.tuples(st.integers(16, 96), st.integers(16, 96)),
    flip=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_label_follows_image(size, crop, flip, seed):
    image, label = labelled_image(*size)
    view = WeakView(crop, (0.5, 2.0), flip, 255)
    cut, target, valid = view(image, label, torch.Generator().manual_seed(seed))
    assert cut.shape == (3, *crop)
    assert target.shape == valid.shape == crop
    assert (target == 255).equal(~valid)
    near = (cut[0].float() - 20 * target).abs() <= 10
    # Bilinear resizing blurs the borders of the blocks; anything shifted would be wrong nearly everywhere.
    assert near[valid].float().mean() > 0.6


def test_scale_one_is_a_plain_crop():
    image, label = labelled_image(100, 120)
    view = WeakView((40, 60), (1.0, 1.0), 0.0, 255)
    cut, target, valid = view(image, label, torch.Generator().manual_seed(3))
    assert cut[0].equal((target * 20).to(torch.uint8))
    assert valid.all()


def test_same_generator_same_view():
    image, label = labelled_image(100, 120)
    view = WeakView((40, 60), (0.5, 2.0), 0.5, 255)
    first = view(image, label, torch.Generator().manual_seed(5))
    unlabelled = view(image, None, torch.Generator().manual_seed(5))
    assert first[0].equal(unlabelled[0])
    assert unlabelled[1] is None


@pytest.mark.parametrize("seed", range(20))
def test_view_around_a_pixel_contains_it(seed):
    image = torch.zeros(3, 200, 200, dtype=torch.uint8)
    label = torch.zeros(200, 200, dtype=torch.uint8)
    label[150:160, 20:30] = 3
    source = torch.Generator().manual_seed(seed)
    pixel = rare_class_pixel(label, torch.tensor([0.0, 1.0, 1.0, 1.0]), source)
    assert pixel is not None
    assert label[pixel] == 3
    _, target, _ = WeakView((64, 64), (0.8, 1.25), 0.5, 255)(image, label, source, pixel)
    assert (target == 3).any()


def test_no_pixel_of_a_class_that_counts():
    assert rare_class_pixel(torch.zeros(4, 4, dtype=torch.uint8), torch.tensor([0.0, 1.0]), torch.Generator()) is None
