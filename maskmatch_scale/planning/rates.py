"""How long an operation takes: a roofline over data sheets with named efficiencies, or what was measured.

Roofline (Williams et al., 2009): the products at their rate, or the bytes at theirs, whichever takes longer.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch

from maskmatch_scale.planning import efficiency
from maskmatch_scale.planning.recorder import Operation
from maskmatch_scale.planning.setting import Gpu

Kind = Literal["product", "attention", "convolution", "other"]


def kind_of(name: str) -> Kind:
    """What an operator of torch is, by its name, such as `aten.mm`."""
    if "scaled_dot_product" in name or "flash_attention" in name or "efficient_attention" in name:
        return "attention"
    if "convolution" in name or "conv2d" in name:
        return "convolution"
    word = name.rpartition(".")[2]
    return "product" if word in {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_addmm_activation"} else "other"


class Rates(Protocol):
    """Seconds of a device."""

    launch_s: float
    """Of the host, for each operation; it goes on while the device works."""
    network_share: float
    """Share of a link's bandwidth that large collectives reach."""
    overlaps: bool
    """Whether collectives go on beside computing."""

    def seconds(self, operation: Operation) -> float:
        """Of the device, for one operation."""

    def moving_s(self, moved: float) -> float:
        """Of reading and writing so many bytes."""

    def adamw_s(self, parameters: float) -> float:
        """Of a step of AdamW on so many fp32 parameters."""

    def is_product(self, operation: Operation) -> bool:
        """Whether its products bound it, and not its bytes."""


class SheetRates:
    """Of a GPU by its data sheet, at the shares of `planning/efficiency.py`."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._shares = {
            "product": efficiency.PRODUCTS,
            "attention": efficiency.PRODUCTS,
            "convolution": efficiency.CONVOLUTIONS,
            "other": 1.0,
        }
        self.launch_s = gpu.launch_s
        self.network_share = efficiency.NETWORK
        self.overlaps = True

    def seconds(self, operation: Operation) -> float:
        """The longer of products and bytes."""
        half = operation.dtype in (torch.bfloat16, torch.float16)
        peak = self._gpu.half_flops if half else self._gpu.fp32_flops
        products = operation.flops / (peak * self._shares[kind_of(operation.name)])
        return max(products, self.moving_s(operation.bytes))

    def moving_s(self, moved: float) -> float:
        """At the memory's bandwidth."""
        return moved / (self._gpu.bandwidth * efficiency.MEMORY)

    def adamw_s(self, parameters: float) -> float:
        """As one kernel that reads and writes everything once."""
        return self.moving_s(efficiency.ADAMW_BYTES * parameters)

    def is_product(self, operation: Operation) -> bool:
        """Whether its products take longer than its bytes."""
        return self.seconds(operation) > self.moving_s(operation.bytes)
