"""Layers that write what is gathered next into a table with a zero row: the same numbers, and no copy."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskmatch_scale.models.segformer.layers import TableLinear

from .test_masked_forward import batch


@pytest.mark.parametrize("autocast", [False, True])
def test_a_table_holds_what_the_layer_gives_and_a_zero_row(autocast):
    torch.manual_seed(0)
    layer, tokens = TableLinear(24, 96), torch.randn(2, 37, 24)
    upstream = torch.randn(2, 37, 96)
    found = []
    for table in (False, True):
        x = tokens.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(x, table=table)
        if table:
            out, rows = out
            assert not rows.requires_grad
            assert rows[:-1].equal(out)
            assert rows[:-1].data_ptr() == out.data_ptr()
            assert rows[-1].eq(0).all()
            out = out.view(2, 37, 96)
        layer.zero_grad()
        out.backward(upstream.to(out.dtype))
        found.append([out, x.grad, layer.weight.grad, layer.bias.grad])
    # If ZeRO-3 ran in this process before, DeepSpeed has replaced F.linear: under autocast it adds the bias in fp32.
    tolerance = 2**-6 if autocast else 0.0
    for plain, other in zip(*found, strict=True):
        assert other.dtype == plain.dtype
        torch.testing.assert_close(other, plain, rtol=tolerance, atol=tolerance)


def test_gradients_of_a_table_are_right():
    layer = TableLinear(3, 5).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    forward = lambda x, *_: layer(x, table=True)[0]  # noqa: E731
    assert torch.autograd.gradcheck(forward, (x, layer.weight, layer.bias))


class Joined(TorchDispatchMode):
    """Notes how wide the rows are that `torch.cat` copies."""

    def __init__(self):
        super().__init__()
        self.widths = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.widths.append(result.shape[-1])
        return result


def test_no_wide_activation_is_copied_to_append_a_zero_row(build):
    segmenter = build("segformer", context=False).train()
    images, visible = batch(segmenter)
    with Joined() as joined:
        features = segmenter.encode(images, visible)
        sum(level.square().sum() for level in features).backward()
    assert joined.widths == [8, 12, 16]  # tokens before the patch embeddings of stages 2 to 4, and nothing else


def test_another_activation_than_gelu_has_the_gradients_of_whole_images(segformer_folder):
    from maskmatch_scale.models import build_segmenter

    torch.manual_seed(0)
    name = f"transformers/{segformer_folder(hidden_act='relu')}"
    segmenter = build_segmenter(name, 5, context=False).double().train()
    images, visible = batch(segmenter, k=12)
    gradients = []
    for run in (lambda: segmenter.encode(images), lambda: segmenter.encoder.by_units(images, visible, (3, 4))):
        segmenter.zero_grad()
        # Sums over positions do not depend on their order.
        levels = [level.movedim(1, -1) if level.dim() == 4 else level for level in run()]
        sum((level.square() * torch.arange(level.shape[-1])).sum() for level in levels).backward()
        gradients.append([parameter.grad for parameter in segmenter.backbone.parameters()])
    for whole, masked in zip(*gradients, strict=True):
        scale = whole.abs().max().clamp_min(1)
        torch.testing.assert_close(masked / scale, whole / scale, rtol=1e-9, atol=1e-9)
