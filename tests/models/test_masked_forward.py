"""What a masked forward promises whatever the backbone: no leak, all visible is the whole image, statistics kept."""

import copy

import pytest
import torch

from maskmatch_scale.models import units

from .conftest import FAMILIES, VITS

OTHER_CHANNELS = (1, 5)
HEADS = ["segformer", "linear", "pixel_shuffle", "dpt"]


def batch(segmenter, rows=3, cols=4, k=5, count=2):
    unit = segmenter.unit_px
    images = torch.randn(count, segmenter.in_channels, rows * unit, cols * unit, dtype=torch.float64)
    return images, units.sample_visible(count, (rows, cols), k)


@pytest.mark.parametrize(
    ("head", "channels"), [*((head, 3) for head in HEADS), *(("linear", channels) for channels in OTHER_CHANNELS)]
)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["drop", "zero"])
def test_masked_pixels_change_nothing_and_get_no_gradient(build, family, head, channels, mode):
    segmenter = build(family, head=head, in_channels=channels).train()  # BatchNorm by batch: any leak would spread
    for module in segmenter.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    images, visible = batch(segmenter)
    images.requires_grad_()
    mask = units.visible_pixel_mask(visible, (3, 4), segmenter.unit_px)[:, None].expand_as(images)
    logits = segmenter(images, visible, mode)
    logits.square().sum().backward()
    assert images.grad[~mask].eq(0).all()
    assert images.grad[mask].ne(0).any()

    other = torch.where(mask, images.detach(), 100 * torch.randn_like(images))
    assert segmenter(other, visible, mode).equal(logits)
    for level, same in zip(segmenter.encode(other, visible, mode), segmenter.encode(images, visible, mode)):
        assert level.equal(same)
    other[~mask] = torch.nan
    assert segmenter(other, visible, mode).equal(logits)


@pytest.mark.parametrize(
    ("head", "channels"), [*((head, 3) for head in HEADS), *(("linear", channels) for channels in OTHER_CHANNELS)]
)
@pytest.mark.parametrize(
    ("family", "halos"),
    [
        *((family, False) for family in [*FAMILIES, "dinov2", "dinov3", "rope_mixed"]),
        # A SegFormer takes whole images when every unit is visible; its halos give the same.
        ("segformer", True),
        ("segformer_fine", True),
    ],
)
def test_all_visible_is_the_full_forward_with_its_gradients(build, family, head, channels, halos, monkeypatch):
    segmenter = build(family, head=head, in_channels=channels).eval()
    if halos:
        monkeypatch.setattr(segmenter.encoder, "visible", segmenter.encoder.by_units)
    images, visible = batch(segmenter, k=12)
    weight = None
    gradients = []
    for mask in (None, visible):
        logits = segmenter(images, mask)
        weight = torch.randn_like(logits) if weight is None else weight
        (logits * weight).sum().backward()
        gradients.append([p.grad for n, p in segmenter.named_parameters() if not n.startswith("context.")])
        segmenter.zero_grad()
        if mask is None:
            whole = logits
    # The scrambled convolutions of dpt make logits, and with them the rounding, a thousand times larger.
    scale = whole.abs().max().clamp_min(1)
    torch.testing.assert_close(logits / scale, whole / scale, rtol=0, atol=1e-11)
    for full, masked in zip(*gradients):
        scale = full.abs().max().clamp_min(1)
        torch.testing.assert_close(masked / scale, full / scale, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", ["segformer", "segformer_fine"])
def test_a_segformer_with_all_units_visible_runs_whole_images(build, family, training, monkeypatch):
    segmenter = build(family, backbone_options={"drop_path_rate": 0.3}).train(training)
    images, visible = batch(segmenter, k=12)
    monkeypatch.setattr(segmenter.encoder, "by_units", lambda *_: pytest.fail("halos are slower here"))
    torch.manual_seed(1)
    whole = segmenter.encode(images)
    torch.manual_seed(1)
    tokens = segmenter.encode(images, visible)
    for maps, level in zip(whole, tokens, strict=True):
        assert level.shape[:2] == visible.shape
        assert units.merge_units(level, visible, None, (3, 4)).equal(maps)
    # One unit fewer is another function, which only the units themselves can compute.
    with pytest.raises(pytest.fail.Exception):
        segmenter.encode(images, visible[:, :11])


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_mode_is_the_full_forward_of_painted_images(build, family):
    segmenter = build(family).eval()
    images, visible = batch(segmenter)
    painted = units.zero_masked_pixels(images, visible, (3, 4), segmenter.unit_px)
    assert segmenter(images, visible, "zero").equal(segmenter(painted))
    assert not torch.allclose(segmenter(images, visible, "zero"), segmenter(images, visible, "drop"))


@pytest.mark.parametrize("head", [None, "dpt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_context_fills_masked_units_from_what_surrounds_them(build, family, head):
    segmenter = build(family, head=head).eval()
    images, visible = batch(segmenter, count=1)
    grid = segmenter.unit_grid(*images.shape[2:])
    one, two = (segmenter._complete(segmenter.encode(x, visible), visible, grid) for x in (images, images.roll(1, 3)))
    masked = units.masked_units(visible, grid)
    for first, second, tokens in zip(one, two, segmenter.encode(images, visible)):
        assert units.gather_units(first, visible, grid).equal(tokens)  # visible features pass by unchanged
        guess, other = (units.gather_units(maps, masked, grid) for maps in (first, second))
        assert (guess - other).abs().mean() > 1e-3  # other surroundings, other guess
        assert (guess[:, 0] - guess[:, 1]).abs().mean() > 1e-3  # another place, another guess
        if guess.shape[2] > 1:
            assert guess.std(dim=(2, 3)).mean() > 1e-3  # detail within a unit
    # Any grid will do, also one never seen before.
    images, visible = batch(segmenter, rows=5, cols=2, k=3)
    assert segmenter(images, visible).isfinite().all()


@pytest.mark.parametrize("head", [None, "dpt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_learns_from_a_masked_pass(build, family, head):
    """Else DDP hangs or ZeRO-1 ranks disagree; the context decoder trains together with the rest."""
    segmenter = build(family, head=head).train()
    images, visible = batch(segmenter)
    segmenter(images, visible).square().sum().backward()
    without = [n for n, p in segmenter.named_parameters() if p.grad is None]
    assert not without


@pytest.mark.parametrize("mode", ["drop", "zero"])
def test_masked_passes_leave_running_statistics_alone(build, mode):
    segmenter = build("segformer").train()
    images, visible = batch(segmenter)
    before = copy.deepcopy(dict(segmenter.named_buffers()))
    segmenter(images, visible, mode)
    assert all(buffer.equal(before[name]) for name, buffer in segmenter.named_buffers())
    segmenter(images)
    assert not segmenter.head.batch_norm.running_mean.equal(before["head.batch_norm.running_mean"])


def test_dropout_and_stochastic_depth_act_in_training_alone(build):
    segmenter = build("segformer", backbone_options={"drop_path_rate": 0.5, "hidden_dropout_prob": 0.2})
    images, visible = batch(segmenter)
    assert not segmenter.train().encode(images, visible)[3].equal(segmenter.encode(images, visible)[3])
    assert segmenter.eval().encode(images, visible)[3].equal(segmenter.encode(images, visible)[3])


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_autocast_gives_float32_logits(build, family):
    segmenter = build(family).float().eval()
    images, visible = batch(segmenter)
    images = images.float()
    for mask in (None, visible):
        exact = segmenter(images, mask)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = segmenter(images, mask)
        assert rounded.dtype == torch.float32
        # Scrambled weights amplify rounding; test_heads.py holds the head to the published one's error.
        assert (rounded - exact).abs().mean() < 0.25 * exact.abs().mean()


@pytest.mark.parametrize("head", [None, "dpt"])
@pytest.mark.parametrize("family", VITS)
def test_a_copy_runs_its_own_weights(build, family, head):
    segmenter = build(family, head=head).eval()
    images, visible = batch(segmenter)
    teacher = copy.deepcopy(segmenter)
    before = teacher(images, visible)
    with torch.no_grad():
        for parameter in segmenter.parameters():
            parameter.mul_(0.5)
    assert teacher(images, visible).equal(before)
    assert not segmenter(images, visible).equal(before)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", [None, "drop", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_is_encode_perturb_decode(build, family, mode, training):
    segmenter = build(family, head="pixel_shuffle").train(training)
    images, visible = batch(segmenter)
    masked = () if mode is None else (visible, mode)
    logits = segmenter(images, *masked)
    features = segmenter.encode(images, *masked)
    assert segmenter.decode(features, images.shape[2:], *masked).equal(logits)
    shapes = []

    def halve(levels):
        shapes.extend(level.shape for level in levels)
        return [level / 2 for level in levels]

    perturbed = segmenter(images, *masked, perturb=halve)
    assert shapes == [level.shape for level in features]
    assert segmenter.decode([level / 2 for level in features], images.shape[2:], *masked).equal(perturbed)
    assert not perturbed.allclose(logits)
