"""Activation checkpointing, compilation, and images that cannot be computed with."""

import weakref

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from maskmatch_scale.models import units

from .test_masked_forward import FAMILIES, batch


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [False, True])
def test_checkpointed_blocks_give_the_same_gradients_and_run_twice(build, family, masked):
    # Stochastic depth, so that the second run must also draw what the first one drew.
    options = {"backbone_options": {"drop_path_rate": 0.3}} if family.startswith("segformer") else {}
    gradients, norms = [], []
    for checkpoint in (False, True):
        segmenter = build(family, checkpoint_activations=checkpoint, **options).train()
        if not family.startswith("segformer"):
            segmenter.encoder.recomputes = False  # its norms would be counted, too
        images, visible = batch(segmenter)
        torch.manual_seed(3)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            segmenter(images, visible if masked else None).square().sum().backward()
        norms.append(sum(e.count for e in profiler.key_averages() if e.key == "aten::native_layer_norm"))
        gradients.append([p.grad for n, p in segmenter.named_parameters() if masked or "context." not in n])
    for plain, again in zip(*gradients):
        torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-9)
    assert norms[1] > norms[0]


def test_checkpointed_blocks_keep_no_wide_activation(build):
    segmenter = build("segformer", checkpoint_activations=True).train()
    images, visible = batch(segmenter)
    kept = []
    for stage in segmenter.backbone.stages:
        for block in stage.blocks:
            # Whole images give tokens; unit tokens give tokens and the table that they lie in.
            block.mlp.fc1.register_forward_hook(
                lambda _, __, out: kept.extend(map(weakref.ref, out if isinstance(out, tuple) else (out,)))
            )
    for mask in (None, visible):
        kept.clear()
        logits = segmenter(images, mask)
        assert logits.requires_grad
        assert kept
        assert all(wide() is None for wide in kept)


@pytest.mark.parametrize("family", ["segformer", "vit"])
def test_another_mask_needs_no_other_graph(build, family):
    """No shape depends on data: one compiled graph serves every mask of k units."""
    segmenter = build(family, context=False).eval()
    images, visible = batch(segmenter)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, v: segmenter.encode(x, v), backend=backend, fullgraph=True)
    with torch.no_grad():
        for seed in range(3):
            draw = torch.Generator().manual_seed(seed)
            visible = units.sample_visible(len(images), (3, 4), visible.shape[1], draw)
            for level, expected in zip(compiled(images, visible), segmenter.encode(images, visible)):
                torch.testing.assert_close(level, expected, rtol=0, atol=1e-12)
    assert len(graphs) == 1


@pytest.mark.parametrize("family", ["segformer", "vit"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_named(build, family, value):
    segmenter = build(family).eval()
    images, visible = batch(segmenter)
    row, col = divmod(int(visible[1, 0]), 4)
    images[1, 2, row * segmenter.unit_px, col * segmenter.unit_px] = value
    for mask in (None, visible):
        with pytest.raises(ValueError, match=rf"images: 1 values are not finite, e\.g\. {value} in image 1 of 2"):
            segmenter(images, mask)
