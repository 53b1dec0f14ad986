"""Cheap outputs that are made again in the backward pass: the same gradients, and less that is kept."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from benchmarks.harness import peak_mb
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.models.recompute import mark_cheap_outputs, recomputing
from tests.conftest import TINY_VIT


def gradients(segmenter, images, visible):
    segmenter.zero_grad()
    segmenter(images, visible).square().sum().backward()
    return [parameter.grad.clone() for parameter in segmenter.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"init_values": 0.1, "qk_norm": True, "proj_drop_rate": 0.1}])
def test_gradients_are_the_same_to_the_last_bit(options, masked, autocast):
    torch.manual_seed(0)
    segmenter = build_segmenter("timm/vit_tiny_patch16_224", 3, image_size=64, backbone_options=TINY_VIT | options)
    segmenter.train()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    visible = torch.tensor([[0, 3], [1, 2]]) if masked else None
    found = []
    for recomputes in (True, False):
        segmenter.encoder.recomputes = recomputes
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(gradients(segmenter, images, visible))
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


def layers_of(width, number):
    block = [nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)]
    return nn.Sequential(*(layer for _ in range(number) for layer in copy.deepcopy(block)))


def test_less_is_kept():
    layers, inputs = layers_of(8, 20), torch.randn(200, 8)
    mark_cheap_outputs(layers)

    def kept(context):
        def run():
            with context():
                output = layers(inputs)
            output.sum().backward()
            layers.zero_grad()

        run()
        return peak_mb(run, [], torch.device("cpu"))

    # A block keeps 8 + 8 + 32 + 32 values a row, of which 8 + 32 are made again.
    assert kept(recomputing) < 0.6 * kept(nullcontext)


def test_a_copy_computes_with_its_own_weights():
    layers, inputs = layers_of(4, 1), torch.randn(3, 4)
    mark_cheap_outputs(layers)
    other = copy.deepcopy(layers)
    with torch.no_grad():
        other[0].weight.fill_(2.0)
    plain = copy.deepcopy(other)
    with recomputing():
        output = other(inputs)
    output.sum().backward()
    plain(inputs).sum().backward()
    assert all(p.grad.equal(q.grad) for p, q in zip(other.parameters(), plain.parameters(), strict=True))
    assert all(p.grad is None for p in layers.parameters())
