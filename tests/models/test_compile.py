"""torch.compile of a backbone's blocks changes no number that matters, and needs no new graph for every mask."""

import copy
from functools import partial

import pytest
import torch

from maskmatch_scale.models import build_segmenter
from maskmatch_scale.models.units import sample_visible
from tests.conftest import TINY_SEGFORMER, TINY_VIT, needs_compiler

VIT, SEGFORMER = "timm/vit_tiny_patch16_224", "transformers/segformer-b0"
OPTIONS = {VIT: TINY_VIT | {"depth": 4}, SEGFORMER: TINY_SEGFORMER}


def masks(segmenter):
    """A whole image of 128 px, two masks of 5 units, one of 9."""
    grid = segmenter.unit_grid(128, 128)
    draws = [sample_visible(2, grid, k, torch.Generator().manual_seed(k)) for k in (5, 5, 9)]
    return [None, *draws]


@pytest.mark.slow  # the compiler takes most of a minute
@needs_compiler
@pytest.mark.parametrize(("backbone", "head"), [(VIT, "linear"), (VIT, "dpt"), (SEGFORMER, "segformer")])
def test_compiled_blocks_equal_eager_ones(backbone, head):
    torch.manual_seed(0)
    eager = build_segmenter(backbone, 3, head=head, image_size=128, backbone_options=OPTIONS[backbone]).eval()
    compiled = copy.deepcopy(eager)
    compiled.compile_blocks()
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    images = torch.randn(2, 3, 128, 128)
    for visible in masks(eager):
        logits, expected = compiled(images, visible), eager(images, visible)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        logits.square().sum().backward()
        expected.square().sum().backward()
    for (name, one), other in zip(compiled.named_parameters(), eager.parameters()):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("autocast", [False, True])
def test_traced_blocks_of_a_segformer_are_the_blocks(monkeypatch, autocast):
    """What is handed to the compiler, run as it is: one graph a block and pass, and the same numbers bit for bit."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    torch.manual_seed(0)
    options = TINY_SEGFORMER | {"depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2]}
    options |= {"mlp_ratios": [2, 2], "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2]}
    options |= {"num_encoder_blocks": 2}
    eager = build_segmenter(SEGFORMER, 3, backbone_options=options)
    traced = copy.deepcopy(eager)
    traced.compile_blocks()
    images = torch.randn(2, 3, 32, 32)
    for visible in (None, torch.tensor([[0, 5, 9], [3, 4, 15]])):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            levels, expected = traced.encode(images, visible), eager.encode(images, visible)
        assert all(level.equal(plain) for level, plain in zip(levels, expected, strict=True))
        for features in (levels, expected):
            sum(level.square().sum() for level in features).backward()
    for one, other in zip(traced.backbone.parameters(), eager.backbone.parameters(), strict=True):
        assert one.grad.equal(other.grad)


@pytest.mark.parametrize("backbone", [VIT, SEGFORMER])
def test_no_graph_a_block_and_none_a_mask(monkeypatch, backbone):
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    torch._dynamo.reset()
    # Every block with a drop path of its own: more graphs than torch's own limit, after which it would compile none.
    deep = {VIT: {"depth": 12}, SEGFORMER: {"depths": [1, 1, 6, 1]}}
    options = OPTIONS[backbone] | deep[backbone] | {"drop_path_rate": 0.1}
    segmenter = build_segmenter(backbone, 3, image_size=128, backbone_options=options)
    segmenter.compile_blocks()
    grid = segmenter.unit_grid(128, 128)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for number in range(3):
            segmenter(torch.randn(2, 3, 128, 128)).sum().backward()
            visible = sample_visible(2, grid, 5, torch.Generator().manual_seed(number))
            segmenter(torch.randn(2, 3, 128, 128), visible).sum().backward()
            if number == 0:
                first = len(graphs)
    assert len(graphs) == first
