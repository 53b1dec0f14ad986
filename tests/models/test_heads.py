"""The re-associated head gives the logits of the published one."""

import pytest
import torch
from transformers import SegformerConfig
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

from maskmatch_scale.models.heads import LinearHead, SegformerHead

CHANNELS = [8, 16, 40, 64]


@pytest.fixture
def heads():
    torch.manual_seed(0)
    config = SegformerConfig(hidden_sizes=CHANNELS, decoder_hidden_size=48, num_labels=7, classifier_dropout_prob=0.0)
    published, ours = SegformerDecodeHead(config), SegformerHead(CHANNELS, 7, 48, 0.0)
    ours.load_state_dict(published.state_dict(), strict=True)
    published.load_state_dict(ours.state_dict(), strict=True)
    features = [torch.randn(2, c, 24 // s, 40 // s) for c, s in zip(CHANNELS, (1, 2, 4, 8))]
    return ours, published, features


@pytest.mark.parametrize("training", [False, True])
def test_same_logits_and_gradients_in_float32(heads, training):
    ours, published, features = heads
    logits, expected = ours.train(training)(features), published.train(training)(features)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    weight = torch.randn_like(logits) / logits[0].numel()
    (logits * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = dict(published.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-5)
    buffers = dict(published.named_buffers())
    assert all(torch.allclose(b, buffers[n], atol=1e-6) for n, b in ours.named_buffers())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_constant_before_a_batchs_own_normalisation_has_no_gradient(heads, frozen):
    ours, published, features = heads
    for head in (ours.train(), published.train()):
        head.batch_norm.train(not frozen)
        head(features).square().sum().backward()
    for one, other in zip(ours.linear_projections, published.linear_projections):
        # The published head leaves rounding there, which AdamW would turn into whole steps.
        assert bool(one.proj.bias.grad.any()) == frozen
        assert other.proj.bias.grad.any()


def test_rounds_no_more_than_the_published_head_under_autocast(heads):
    ours, published, features = heads
    exact = published.eval()(features)
    with torch.autocast("cpu", torch.bfloat16):
        error, published_error = ((h.eval()(features) - exact).abs().mean() for h in (ours, published))
    assert error <= published_error


def test_runs_in_pure_bfloat16(heads):
    ours, _, features = heads
    logits = ours.bfloat16()([f.bfloat16() for f in features])
    assert logits.dtype == torch.bfloat16


def test_features_are_not_overwritten(heads):
    ours, _, features = heads
    before = [f.clone() for f in features]
    ours(features)
    LinearHead(CHANNELS, 3)(features)
    assert all(f.equal(b) for f, b in zip(features, before))


def test_linear_head_is_a_classifier_of_concatenated_upsampled_features():
    features = [torch.randn(2, 4, 8, 12), torch.randn(2, 6, 4, 6)]
    head = LinearHead([4, 6], 3)
    upsampled = torch.nn.functional.interpolate(features[1], size=(8, 12), mode="bilinear")
    weight = torch.cat([c.weight for c in head.classifiers], dim=1)
    expected = torch.einsum("oc,bchw->bohw", weight, torch.cat([features[0], upsampled], 1))
    torch.testing.assert_close(head(features), expected + head.classifiers[0].bias[:, None, None])


def test_pixel_shuffle_places_classes_times_r2_values():
    head = LinearHead([4], 3, shuffle=2)
    features = torch.randn(1, 4, 5, 6)
    logits = head([features])
    assert logits.shape == (1, 3, 10, 12)
    values = torch.einsum("oc,bchw->bohw", head.classifiers[0].weight, features)
    torch.testing.assert_close(logits[0, 1, 7, 9], values[0, 1 * 4 + 1 * 2 + 1, 3, 4])
