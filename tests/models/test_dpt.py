"""The DPT head: its pyramid, its fusion, and where its cost lies."""

import pytest
import torch
import torch.nn.functional as F

from maskmatch_scale.models.dpt import DptHead, dpt_width
from maskmatch_scale.models.heads import build_head


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7), (1, 1)])
def test_a_vits_levels_become_a_pyramid(height, width):
    head = DptHead([32] * 4, [16] * 4, 3, 32, 0.0)
    features = [torch.randn(2, 32, height, width) for _ in range(4)]
    sizes = [tuple(layer(level).shape) for layer, level in zip(head.reassemble, features)]
    halved = -(-height // 2), -(-width // 2)
    assert sizes == [(2, 32, f * height, f * width) for f in (4, 2, 1)] + [(2, 32, *halved)]
    assert head(features).shape == (2, 3, 4 * height, 4 * width)


def test_a_pyramid_is_taken_as_it_is():
    head = build_head("dpt", [8, 16, 24, 32], [4, 8, 16, 32], 3, 256, 0.0)
    features = [torch.randn(1, c, 64 // s, 96 // s) for c, s in zip([8, 16, 24, 32], [4, 8, 16, 32])]
    assert head(features).shape == (1, 3, 16, 24)


def test_fusion_projects_before_it_upsamples_which_is_the_same():
    head = DptHead([32] * 4, [16] * 4, 3, 32, 0.0).double()
    fusion = head.fuse[0]
    level, coarser = torch.randn(1, 32, 8, 12).double(), torch.randn(1, 32, 4, 6).double()
    wide = F.interpolate(coarser, scale_factor=2, mode="bilinear")
    expected = fusion.sum(fusion.level(level) + fusion.project(wide))
    torch.testing.assert_close(fusion(level, coarser), expected, rtol=0, atol=1e-12)


def test_every_level_reaches_the_logits_at_a_sensible_size():
    torch.manual_seed(0)
    head = DptHead([384] * 4, [16] * 4, 19, dpt_width(384), 0.0).eval()
    features = [torch.randn(1, 384, 8, 8) for _ in range(4)]
    logits = head(features)
    assert 0.05 < logits.std() < 5
    for level in range(4):
        changed = [f + (i == level) * torch.randn_like(f) for i, f in enumerate(features)]
        assert (head(changed) - logits).std() > 0.05 * logits.std()


def test_other_numbers_of_levels_are_refused():
    with pytest.raises(ValueError, match="head: dpt fuses features of 4 levels, not of 1"):
        build_head("dpt", [32], [16], 3, 256, 0.0)


@pytest.mark.parametrize(("channels", "width"), [(32, 32), (192, 32), (384, 64), (768, 128), (1024, 160), (1536, 256)])
def test_width_follows_the_backbone(channels, width):
    assert dpt_width(channels) == width
