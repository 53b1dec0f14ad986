"""Frozen parts of a backbone: no gradients and no graph for them, the same gradients above, always in eval mode."""

import copy
from contextlib import contextmanager

import pytest
import torch

from maskmatch_scale.models import build_segmenter
from tests.conftest import TINY_SEGFORMER, TINY_VIT

FAMILIES = {
    "vit": ("timm/vit_tiny_patch16_224", TINY_VIT | {"depth": 4}, "dpt"),
    "eva": ("timm/eva02_tiny_patch14_224", {"embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": 16}, None),
    "clip": ("timm/vit_base_patch16_clip_224.openai", TINY_VIT | {"depth": 4}, None),  # with a norm before the blocks
    "segformer": ("transformers/segformer-b0", TINY_SEGFORMER, None),
}
PARTS = [(family, frozen) for family in FAMILIES for frozen in (1, 2, 4, "backbone")]
VISIBLE = torch.tensor([[0, 2], [1, 3]])


def build(family, **more):
    name, options, head = FAMILIES[family]
    torch.manual_seed(0)
    return build_segmenter(name, 3, head=head, backbone_options=options | more.pop("options", {}), **more)


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@contextmanager
def outputs_of(modules):
    """Tensors that modules give while this is entered."""
    found = []
    hooks = [module.register_forward_hook(lambda module, given, output: found.append(output)) for module in modules]
    yield found
    for hook in hooks:
        hook.remove()


def nodes(logits):
    """Every node of the graph of logits, and the tensors that gradients are added up in."""
    found, leaves, waiting = set(), [], [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            leaves += [node.variable] if hasattr(node, "variable") else []
            waiting += [after for after, _ in node.next_functions]
    return found, leaves


@pytest.mark.parametrize("visible", [None, VISIBLE], ids=["whole", "masked"])
@pytest.mark.parametrize(("family", "frozen"), PARTS)
def test_gradients_above_a_frozen_part_are_the_same(family, frozen, visible):
    whole, part = build(family).double(), build(family).double()
    part.freeze(frozen)
    for segmenter in (whole, part):
        segmenter.train()
        torch.manual_seed(2)  # of dropout in the head
        segmenter(images().double(), visible).square().mean().backward()
    expected = dict(whole.named_parameters())
    for name, parameter in part.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)
        else:
            assert parameter.grad is None
    assert all(parameter.requires_grad for parameter in (*part.head.parameters(), *part.context.parameters()))


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("visible", [None, VISIBLE], ids=["whole", "masked"])
@pytest.mark.parametrize(("family", "frozen"), PARTS)
def test_nothing_is_recorded_for_a_frozen_part(family, frozen, visible, again):
    segmenter = build(family, checkpoint_activations=again)
    segmenter.train()
    count, _ = nodes(segmenter(images(), visible))
    segmenter.freeze(frozen)
    layers = segmenter.encoder.layers
    below = layers if frozen == "backbone" else layers[:frozen]
    inner = [part for layer in below for part in layer.modules() if not list(part.children())]
    with outputs_of(inner) as given:
        logits = segmenter(images(), visible)
    assert given
    assert all(output.grad_fn is None for output in given if isinstance(output, torch.Tensor))
    found, leaves = nodes(logits)
    assert len(found) < len(count) or again
    assert {id(leaf) for leaf in leaves} <= {id(p) for p in segmenter.parameters() if p.requires_grad}
    if frozen != "backbone" and len(layers) > frozen and not again:
        with outputs_of([layers[frozen]]) as given:
            segmenter(images(), visible)
        assert all(output.grad_fn is not None for output in given)


def test_what_a_number_counts():
    def trained(family, frozen):
        segmenter = build(family)
        segmenter.freeze(frozen)
        return {name for name, parameter in segmenter.backbone.named_parameters() if parameter.requires_grad}

    assert {name.split(".")[1] for name in trained("vit", 2)} == {"2", "3", "weight", "bias"}
    assert trained("vit", 4) == {"norm.weight", "norm.bias"}
    assert trained("eva", 4) == {"fc_norm.weight", "fc_norm.bias"}
    assert {name.split(".")[1] for name in trained("segformer", 3)} == {"3"}
    assert trained("segformer", 4) == trained("vit", "backbone") == set()


@pytest.mark.parametrize(
    ("family", "options"),
    [("vit", {"drop_path_rate": 0.9, "pos_drop_rate": 0.5}), ("segformer", {"hidden_dropout_prob": 0.5})],
)
def test_a_frozen_part_is_never_in_training_mode(family, options):
    segmenter = build(family, options=options)
    segmenter.freeze(2)
    copied = copy.deepcopy(segmenter)
    for each in (segmenter, copied, segmenter.eval()):
        each.train()
        with outputs_of([each.encoder.layers[1], each.encoder.layers[3]]) as given:
            each.encode(images())
            each.encode(images())
        second, fourth = given[::2], given[1::2]
        if family == "vit":  # SegFormer's stages are not called as modules
            assert second[0].equal(second[1])
            assert not fourth[0].equal(fourth[1])
        frozen, trained = each.encoder.layers[:2], each.encoder.layers[2:]
        assert not any(part.training for layer in frozen for part in layer.modules())
        assert all(part.training for layer in trained for part in layer.modules())
        assert all(part.training for part in each.head.modules())
    if family == "segformer":
        one, other = segmenter.encode(images()), segmenter.encode(images())
        assert [a.equal(b) for a, b in zip(one, other, strict=True)] == [True, True, False, False]


@pytest.mark.parametrize(
    ("family", "has"), [("vit", "this ViT has 4 blocks"), ("segformer", "this SegFormer has 4 stages")]
)
@pytest.mark.parametrize("number", [0, 5])
def test_more_layers_than_there_are_are_refused(family, has, number):
    segmenter = build(family)
    with pytest.raises(ValueError, match=f"{has}; use a number from 1 to 4, backbone or null"):
        segmenter.freeze(number)
    assert all(parameter.requires_grad for parameter in segmenter.parameters())
