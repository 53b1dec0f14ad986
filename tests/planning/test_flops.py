"""FLOPs of operators: torch's formulas, and the two that are corrected."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskmatch_scale.planning.flops import flops_of


def flops(run):
    """Of everything that a run dispatches, by operator."""
    found = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            name = str(func.overloadpacket)
            found[name] = found.get(name, 0) + flops_of(func, args, kwargs or {}, result)
            return result

    with Count():
        run()
    return found


def test_products_and_attention_of_the_cpu():
    a, b = torch.zeros(3, 4), torch.zeros(4, 5)
    assert flops(lambda: a @ b) == {"aten.mm": 2 * 3 * 4 * 5}
    q = torch.zeros(2, 3, 7, 8, requires_grad=True)
    found = flops(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward())
    forward = 2 * 2 * (2 * 3) * 7 * 7 * 8  # two products
    assert found["aten._scaled_dot_product_flash_attention_for_cpu"] == forward
    # Five products: the scores once more, and two gradients of each of the two products.
    assert found["aten._scaled_dot_product_flash_attention_for_cpu_backward"] == forward * 5 // 2


def test_backward_of_a_grouped_convolution_is_two_forwards():
    x = torch.zeros(2, 8, 6, 6, requires_grad=True)
    convolution = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
    found = flops(lambda: convolution(x).sum().backward())
    assert found["aten.convolution"] == 2 * 2 * 8 * 36 * 9
    assert found["aten.convolution_backward"] == 2 * found["aten.convolution"]
