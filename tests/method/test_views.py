"""Strong views depend on (seed, position) alone, and CutMix keeps images, labels and validity together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as TF

from maskmatch_scale.method import views as module
from maskmatch_scale.method.draws import Drawn, ViewDraws
from maskmatch_scale.method.views import Colours, Neighbour, Unlabelled, View, cutmix_of, standard_normal
from maskmatch_scale.recipe import StrongViewRecipe

OFF = {
    "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "jitter_probability": 1.0,
    "grey_probability": 0.0, "blur_probability": 0.0, "noise": 0.0, "cutmix_probability": 0.0,
}  # fmt: skip


def recipe(**changes):
    return StrongViewRecipe(**(OFF | changes))


def draws_of(recipe, seed, size=(24, 32), strong_views=1):
    return ViewDraws(recipe, seed, strong_views, size, None, 0)


def photometric(images, recipe, seed, positions, *, rgb=True):
    draws = draws_of(recipe, seed)
    drawn = Drawn(draws(positions), draws.strong_views).photometric(0)
    return module.photometric(images, recipe, drawn, Colours(rgb=rgb))


def draw_cutmix(recipe, seed, positions, size, neighbour=None):
    draws = draws_of(recipe, seed, size)
    return cutmix_of(Drawn(draws(positions), draws.strong_views).boxes(0), size, neighbour)


def unlabelled_of(weak, positions, recipe, seed, strong_views=1):
    draws = draws_of(recipe, seed, tuple(weak.images.shape[-2:]), strong_views)
    return Unlabelled(weak, positions, Drawn(draws(positions), draws.strong_views), recipe, seed, Colours())


def images(count=4, size=(24, 32)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


def test_everything_off_is_the_image():
    torch.testing.assert_close(photometric(images(), recipe(), 0, range(4)), images(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue", "noise"])
def test_each_strength_changes_images_within_bounds(name):
    out = photometric(images(), recipe(**{name: 0.4}), 0, range(4))
    assert 0 <= out.min() <= out.max() <= 1
    assert all((o - i).abs().max() > 1e-3 for o, i in zip(out, images()))


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("brightness", TF.adjust_brightness),
        ("contrast", TF.adjust_contrast),
        ("saturation", TF.adjust_saturation),
    ],
)
def test_factors_act_as_in_torchvision(name, reference):
    image = images(1)
    out = photometric(image, recipe(**{name: 0.5}), 3, [17])
    # The factor itself is drawn inside: find it among torchvision's results.
    best = min((reference(image, f) - out).abs().max().item() for f in torch.linspace(0.5, 1.5, 2001).tolist())
    assert best < 2e-3


def test_grey_and_blur_as_in_torchvision():
    image = images(1)
    grey = photometric(image, recipe(grey_probability=1.0), 0, [0])
    torch.testing.assert_close(grey, TF.rgb_to_grayscale(image, 3), rtol=0, atol=2e-4)
    blurred = photometric(image, recipe(blur_probability=1.0, blur_sigma_px=(1.5, 1.5)), 0, [0])
    torch.testing.assert_close(blurred, TF.gaussian_blur(image, [11, 11], [1.5, 1.5]), rtol=0, atol=2e-3)


def test_hue_leaves_grey_pixels_alone():
    grey = images(2).mean(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(photometric(grey, recipe(hue=0.5), 0, [3, 4]), grey, rtol=0, atol=5e-3)


def test_a_view_depends_on_seed_and_position_not_on_the_batch():
    full = StrongViewRecipe(noise=0.1)
    whole = photometric(images(), full, 5, [10, 11, 12, 13])
    part = photometric(images()[2:], full, 5, [12, 13])
    torch.testing.assert_close(whole[2:], part, rtol=0, atol=1e-5)
    assert not photometric(images()[2:], full, 6, [12, 13]).allclose(part)


@given(count=st.integers(1, 7), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_cutmix_takes_boxes_of_the_partner(count, seed):
    always = recipe(cutmix_probability=1.0)
    cutmix = draw_cutmix(always, seed, range(seed, seed + count), (20, 30))
    own = torch.arange(count)[:, None, None].expand(-1, 20, 30)
    mixed = cutmix(own)
    for number in range(count):
        partner = int(cutmix.partner[number])
        assert set(mixed[number].unique().tolist()) <= {number, partner}
        box = cutmix.inside[number].nonzero()
        (top, left), (bottom, right) = box.min(0).values.tolist(), box.max(0).values.tolist()
        assert cutmix.inside[number, top : bottom + 1, left : right + 1].all()
        assert 0.01 <= cutmix.inside[number].float().mean() <= 0.45
        assert (mixed[number] == partner).equal(cutmix.inside[number] | (own[number] == partner))
    four_dimensional = cutmix(own[:, None].expand(-1, 3, -1, -1))
    assert four_dimensional[:, 1].equal(mixed)


@given(ranks=st.integers(1, 5), each=st.integers(1, 5), seed=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_pairs_are_the_same_however_the_batch_is_shared_out(ranks, each, seed):
    always = recipe(cutmix_probability=1.0)
    values = torch.arange(float(ranks * each))[:, None, None].expand(-1, 16, 16)
    whole = draw_cutmix(always, seed, range(ranks * each), (16, 16))(values)

    def part_of(rank):
        own = slice(rank * each, (rank + 1) * each)
        # What `Runtime.of_neighbour` brings: of an odd rank the first, of an even one the last, for the lone last rank
        # that of rank 0.
        number = rank * each - 1 if rank % 2 == 1 else (rank + 1) * each if rank + 1 < ranks else 0
        neighbour = Neighbour(rank % 2 == 0, lambda first, last: values[number]) if ranks > 1 else None
        return draw_cutmix(always, seed, range(own.start, own.stop), (16, 16), neighbour)(values[own])

    assert whole.equal(torch.cat([part_of(rank) for rank in range(ranks)]))


def test_strong_view_mixes_validity_with_the_pixels():
    valid = torch.ones(2, 16, 16, dtype=torch.bool)
    valid[1] = False
    weak = View(images(2, (16, 16)), valid, None)
    strong = unlabelled_of(weak, [0, 1], recipe(cutmix_probability=1.0), 0).strong_view(0)
    assert strong.cutmix is not None
    assert strong.valid[0].equal(~strong.cutmix.inside[0])
    assert strong.images[0][:, strong.cutmix.inside[0]].allclose(weak.images[1][:, strong.cutmix.inside[0]], atol=1e-6)


def test_strong_views_have_seeds_of_their_own_and_are_made_once():
    weak = View(images(2, (16, 16)), torch.ones(2, 16, 16, dtype=torch.bool), None)
    drawn = recipe(brightness=0.5, cutmix_probability=1.0, jitter_probability=1.0)
    unlabelled = unlabelled_of(weak, [4, 5], drawn, 3, strong_views=3)
    views = [unlabelled.strong_view(number) for number in range(3)]
    assert unlabelled.strong_view(1) is views[1]
    assert len({view.images.sum().item() for view in views}) == 3
    assert not views[0].cutmix.inside.equal(views[1].cutmix.inside)
    # Asked for in another order they are the same, and the first is drawn as the only one of a base with one is.
    again = unlabelled_of(weak, [4, 5], drawn, 3, strong_views=3)
    assert again.strong_view(2).images.equal(views[2].images)
    mixed = draw_cutmix(drawn, 3, [4, 5], (16, 16))(photometric(weak.images, drawn, 3, [4, 5]))
    assert views[0].images.equal(mixed)


def test_a_seed_for_features_changes_no_other_draw():
    plain = ViewDraws(StrongViewRecipe(), 3, 2, (64, 64), (4, 4), 8)
    more = ViewDraws(StrongViewRecipe(), 3, 2, (64, 64), (4, 4), 8, feature_seed=True)
    assert more.width == plain.width + 1
    without, own = Drawn(plain([4, 5]), 2), Drawn(more([4, 5]), 2, feature_seed=True)
    assert own.visible.equal(without.visible)
    assert own.boxes(1).equal(without.boxes(1))
    assert own.feature_seeds.equal(Drawn(more([5, 4]), 2, feature_seed=True).feature_seeds.flip(0))
    assert own.feature_seeds.unique().numel() == 2


def test_noise_is_normal_and_depends_on_seed_and_place_alone():
    seeds = torch.tensor([0, 1, 2**31 - 1])
    noise = standard_normal(seeds, (256, 320))
    assert noise.shape == (3, 256, 320)
    assert noise[1].equal(standard_normal(seeds[1:2], (256, 320))[0])
    # Rows of a smaller image are the first numbers of the same sequence.
    assert noise[2].flatten()[: 8 * 8].equal(standard_normal(seeds[2:], (8, 8)).flatten())
    n = noise[0].numel()
    for image in noise.double():
        assert abs(image.mean()) < 4 / n**0.5
        assert abs(image.var() - 1) < 4 * (2 / n) ** 0.5
        assert abs((image**3).mean()) < 4 * (15 / n) ** 0.5
        assert abs((image**4).mean() - 3) < 4 * (96 / n) ** 0.5
        assert (image.abs() > 3).double().mean().item() == pytest.approx(0.0027, rel=0.25)
        for other in (image.roll(1), image.roll(1, 0)):  # neighbours are independent
            assert abs((image * other).mean()) < 4 / n**0.5
    assert abs((noise[0] * noise[1]).mean()) < 4 / n**0.5


def test_bands_without_colours_have_no_luma_and_no_hue():
    bands = torch.rand(4, 5, 24, 32, generator=torch.Generator().manual_seed(2))
    assert photometric(bands, recipe(hue=0.5), 0, range(4), rgb=False).equal(bands)
    grey = photometric(bands, recipe(grey_probability=1.0), 0, range(4), rgb=False)
    torch.testing.assert_close(grey, bands.mean(1, keepdim=True).expand_as(bands))
    faded = photometric(bands, recipe(saturation=0.5), 0, range(4), rgb=False)
    towards = faded.clamp(0, 1) - bands.mean(1, keepdim=True)
    assert not faded.equal(bands)
    # Between the band and the mean of all bands, or beyond the band on the same side.
    assert ((towards * (bands - bands.mean(1, keepdim=True))) >= -1e-6).all()


def test_contrast_is_about_each_bands_own_mean():
    """A band keeps its mean whatever the others are, so that a bright band does not lift a dark one."""
    bands = torch.rand(4, 5, 24, 32, generator=torch.Generator().manual_seed(2)) * 0.2
    bands += torch.linspace(0.1, 0.7, 5)[:, None, None]
    changed = photometric(bands, recipe(contrast=0.5), 3, range(4), rgb=False)
    assert not changed.allclose(bands)
    torch.testing.assert_close(changed.mean((2, 3)), bands.mean((2, 3)), rtol=0, atol=1e-5)
    alone = photometric(bands[:, 1:2], recipe(contrast=0.5), 3, range(4), rgb=False)
    torch.testing.assert_close(alone, changed[:, 1:2])


@given(st.integers(1, 6), st.integers(0, 2**20))
@settings(deadline=None, max_examples=20)
def test_bands_stay_within_bounds_and_in_any_order(channels, seed):
    bands = torch.rand(2, channels, 24, 32, generator=torch.Generator().manual_seed(seed))
    full = StrongViewRecipe()
    out = photometric(bands, full, seed, [seed, seed + 1], rgb=False)
    assert out.shape == bands.shape
    assert -1e-6 <= out.min() <= out.max() <= 1 + 1e-6  # blur rounds
    turned = photometric(bands.flip(1), full, seed, [seed, seed + 1], rgb=False)
    torch.testing.assert_close(turned.flip(1), out, rtol=0, atol=1e-5)
