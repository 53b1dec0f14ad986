"""torch.compile of a ViT's blocks changes no number that matters, and needs no new graph for every mask."""

import copy
from functools import partial

import pytest
import torch

from maskmatch_scale.models import build_segmenter
from maskmatch_scale.models.units import sample_visible
from tests.conftest import TINY_SEGFORMER, TINY_VIT


@pytest.mark.slow  # the compiler takes most of a minute
@pytest.mark.parametrize("head", ["linear", "dpt"])
def test_compiled_blocks_equal_eager_ones(head):
    torch.manual_seed(0)
    options = TINY_VIT | {"depth": 4}
    eager = build_segmenter("timm/vit_tiny_patch16_224", 3, head=head, image_size=128, backbone_options=options).eval()
    compiled = copy.deepcopy(eager)
    compiled.compile_blocks()
    assert compiled.state_dict().keys() == eager.state_dict().keys()
    images = torch.randn(2, 3, 128, 128)
    for number in range(4):
        visible = None
        if number:
            k = 5 if number < 3 else 9
            visible = sample_visible(2, eager.unit_grid(128, 128), k, torch.Generator().manual_seed(number))
        logits, expected = compiled(images, visible), eager(images, visible)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        logits.square().sum().backward()
        expected.square().sum().backward()
    for (name, one), other in zip(compiled.named_parameters(), eager.parameters()):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_no_graph_a_block_and_none_a_mask(monkeypatch):
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counted))
    torch._dynamo.reset()
    # Every block with a drop path of its own: more graphs than torch's own limit, after which it would compile none.
    options = TINY_VIT | {"depth": 12, "drop_path_rate": 0.1}
    segmenter = build_segmenter("timm/vit_tiny_patch16_224", 3, image_size=128, backbone_options=options)
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


def test_a_segformer_is_not_compiled():
    segmenter = build_segmenter("transformers/segformer-b0", 3, backbone_options=TINY_SEGFORMER)
    with pytest.raises(ValueError, match="only the blocks of a ViT"):
        segmenter.compile_blocks()
