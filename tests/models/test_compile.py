"""torch.compile of a ViT's blocks changes no number that matters, and needs no new graph for every mask."""

import copy

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


def test_a_segformer_is_not_compiled():
    segmenter = build_segmenter("transformers/segformer-b0", 3, backbone_options=TINY_SEGFORMER)
    with pytest.raises(ValueError, match="only the blocks of a ViT"):
        segmenter.compile_blocks()
