"""What GPUs can reach by their makers' data sheets: the denominator of MFU, for runs and for benchmarks.

Data sheets print products of matrices on tensor cores "with sparsity", twice the dense figure. Here all are dense. The
bf16 and fp16 figures are those with fp32 accumulation, which are equal on every card of the table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Peaks(NamedTuple):
    """Dense peaks of one card, 10¹² FLOP/s."""

    fp32: float
    """Outside tensor cores."""
    tf32: float | None
    """None: the card has no TF32."""
    half: float
    """bf16 and fp16 on tensor cores; of V100 and T4, which have no bf16, fp16."""
    source: str
    """NVIDIA's data sheet, by its name."""


PEAKS: dict[str, Peaks] = {
    # The table for one GPU of a GB200 NVL72 (up to 1,200 W) and of an HGX B200 (up to 1,000 W).
    "GB200": Peaks(80, 1250, 2500, "GB200 NVL72 data sheet: TF32 2,500, BF16 5,000 with sparsity"),
    "B200": Peaks(75, 1100, 2250, "HGX B200 data sheet: TF32 2,200, BF16 4,500 with sparsity"),
    "GH200": Peaks(67, 494, 990, "GH200 Grace Hopper data sheet: TF32 989, BF16 1,979 with sparsity"),
    "H200 NVL": Peaks(60, 418, 835, "H200 data sheet: TF32 835, BF16 1,671 with sparsity"),
    "H200": Peaks(67, 495, 989, "H200 data sheet: TF32 989, BF16 1,979 with sparsity"),
    "H100 NVL": Peaks(60, 418, 835, "H100 data sheet: TF32 835, BF16 1,671 with sparsity"),
    "H100 PCIe": Peaks(51, 378, 756, "H100 data sheet: TF32 756, BF16 1,513 with sparsity"),
    "H100": Peaks(67, 495, 989, "H100 data sheet, SXM: TF32 989, BF16 1,979 with sparsity"),
    "A100": Peaks(19.5, 156, 312, "A100 data sheet: TF32 156, BF16 312; the same for SXM and PCIe"),
    "A40": Peaks(37.4, 74.8, 149.7, "A40 data sheet: TF32 74.8, BF16 149.7"),
    "A30": Peaks(10.3, 82, 165, "A30 data sheet: TF32 82, BF16 165"),
    "A10": Peaks(31.2, 62.5, 125, "A10 data sheet: TF32 62.5, BF16 125"),
    "L40S": Peaks(91.6, 183, 362, "L40S data sheet: TF32 183, BF16 362.05"),
    "L40": Peaks(90.5, 90.5, 181, "L40 data sheet: TF32 90.5, BF16 181.05"),
    "L4": Peaks(30.3, 60, 121, "L4 data sheet: TF32 120, BF16 242 with sparsity"),
    "V100 SXM2": Peaks(15.7, None, 125, "V100 data sheet, NVLink: tensor performance 125"),
    "V100 PCIE": Peaks(14, None, 112, "V100 data sheet, PCIe: tensor performance 112"),
    "T4": Peaks(8.1, None, 65, "T4 data sheet: mixed precision 65"),
}
"""By card. A name matches if torch's name of the device contains it as whole words, with hyphens read as spaces. The
first match counts, so longer names come first."""


def peak_tflops(device: torch.device, dtype: torch.dtype, *, tf32: bool = True) -> float | None:
    """10¹² FLOP/s that a device can reach, dense; None for a CPU, and for a GPU that is not in the table.

    Args:
        device: asked for its name; the device itself does nothing.
        dtype: of the factors of matrix products.
        tf32: whether products of float32 matrices may run in TF32.
    """
    return peak_by_name(torch.cuda.get_device_name(device), dtype, tf32=tf32) if device.type == "cuda" else None


def peak_by_name(name: str, dtype: torch.dtype, *, tf32: bool = True) -> float | None:
    """As `peak_tflops`, for a GPU by torch's name of it, such as `NVIDIA H100 80GB HBM3`."""
    words = f" {name.replace('-', ' ')} "
    if " MIG " in words:  # a slice of the GPU
        return None
    for known, peaks in PEAKS.items():
        if f" {known} " in words:
            if dtype != torch.float32:
                return peaks.half
            return peaks.tf32 if tf32 and peaks.tf32 is not None else peaks.fp32
    return None
