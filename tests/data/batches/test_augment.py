"""The weak view keeps image and label together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

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


def with_and_without_margin(image, seed, margin, scale_range=(0.5, 2.0), flip=0.5):
    """A crop of 40 × 60 px, its valid pixels, and the view with a margin."""
    views = [
        WeakView((40, 60), scale_range, flip, 255, margin_px=px)(image, None, torch.Generator().manual_seed(seed))
        for px in (0, margin)
    ]
    assert views[0][2].equal(views[1][2])
    assert views[1][0].shape == (3, 40 + 2 * margin, 60 + 2 * margin)
    return views[0][0], views[0][2], views[1][0]


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(20, 150), st.integers(20, 150)),
    margin=st.integers(1, 50),
    flip=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_a_margin_changes_no_crop(size, margin, flip, seed):
    image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    crop, _, wide = with_and_without_margin(image, seed, margin, flip=flip)
    assert wide[:, margin:-margin, margin:-margin].equal(crop)


@settings(max_examples=60, deadline=None)
@given(margin=st.integers(1, 50), flip=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 2**31))
def test_at_scale_one_a_margin_is_what_the_image_has_there(margin, flip, seed):
    image = torch.randint(1, 256, (3, 70, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    crop, _, wide = with_and_without_margin(image, seed, margin, scale_range=(1.0, 1.0), flip=flip)
    if flip:
        crop, wide = crop.flip(-1), wide.flip(-1)
    tops, lefts = range(70 - 40 + 1), range(90 - 60 + 1)
    (start,) = [(y, x) for y in tops for x in lefts if image[:, y : y + 40, x : x + 60].equal(crop)]
    padded = F.pad(image, (margin,) * 4)  # zero where the image ends
    assert wide.equal(padded[:, start[0] : start[0] + 40 + 2 * margin, start[1] : start[1] + 60 + 2 * margin])


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(30, 120), st.integers(30, 120)),
    margin=st.integers(1, 40),
    flip=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_a_margin_goes_on_as_the_crop_does(size, margin, flip, seed):
    """At any scale: an image whose values rise evenly does so across the edge of the crop, to within a pixel or so."""
    height, width = size
    ramps = torch.arange(height)[:, None] + 50, torch.arange(width)[None] + 50
    image = torch.stack([ramps[0].expand(size), ramps[1].expand(size), torch.full(size, 255)]).to(torch.uint8)
    crop, valid, wide = with_and_without_margin(image, seed, margin, flip=flip)
    assert valid.any()
    rows, columns = (valid.any(dim) for dim in (1, 0))
    inside = wide[2] > 250  # antialiasing leaves a whole 255 wherever the image is
    for channel, there, dim in ((0, rows, 0), (1, columns, 1)):
        own = crop[channel].double()[valid].view(int(rows.sum()), int(columns.sum())).mean(1 - dim)
        step = (own[-1] - own[0]) / max(1, len(own) - 1)
        first = margin + int(there.nonzero()[0])
        expected = own[0] + step * (torch.arange(wide.shape[1 + dim]) - first)
        found = wide[channel].double()
        off = (found - (expected[:, None] if dim == 0 else expected[None])).abs()[inside].max()
        assert off < 2 + 2.5 * abs(float(step)), (channel, float(off), float(step))
    # It reaches as far as the image does.
    for dim, side in ((0, height), (1, width)):
        reached = inside.any(1 - dim).nonzero().flatten().tolist()
        for edge in (reached[0], reached[-1]):
            value = float(wide[dim].select(dim, edge)[inside.select(dim, edge)].double().mean())
            of_image = min(abs(value - 50), abs(value - 50 - (side - 1))) < 4
            assert of_image or edge in (0, wide.shape[1 + dim] - 1)


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
