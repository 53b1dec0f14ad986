"""Peaks of GPUs by the name that torch gives them."""

import pytest
import torch

from maskmatch_scale.device_peaks import PEAKS, peak_by_name, peak_tflops


@pytest.mark.parametrize(
    ("name", "half", "tf32", "fp32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 156, 19.5),
        ("NVIDIA H100 80GB HBM3", 989, 495, 67),
        ("NVIDIA H100 PCIe", 756, 378, 51),
        ("NVIDIA H100 NVL", 835, 418, 60),
        ("NVIDIA H200", 989, 495, 67),
        ("NVIDIA H200 NVL", 835, 418, 60),
        ("NVIDIA B200", 2250, 1100, 75),
        ("NVIDIA GB200", 2500, 1250, 80),
        ("NVIDIA GH200 480GB", 990, 494, 67),
        ("NVIDIA L40S", 362, 183, 91.6),
        ("NVIDIA L40", 181, 90.5, 90.5),
        ("NVIDIA L4", 121, 60, 30.3),
        ("Tesla V100-SXM2-32GB", 125, 15.7, 15.7),  # it has no TF32
        ("Tesla T4", 65, 8.1, 8.1),
        ("NVIDIA A10G", None, None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None, None),
    ],
)
def test_peak_by_dtype(name, half, tf32, fp32):
    assert peak_by_name(name, torch.bfloat16) == peak_by_name(name, torch.float16) == half
    assert peak_by_name(name, torch.float32) == tf32
    assert peak_by_name(name, torch.float32, tf32=False) == fp32


def test_a_cpu_has_none():
    assert peak_tflops(torch.device("cpu"), torch.float32) is None


def test_figures_are_dense():
    """A figure with sparsity is twice the dense one, and on every tensor core of NVIDIA's bf16 is twice TF32."""
    for name, peaks in PEAKS.items():
        assert peaks.source, name
        if peaks.tf32 is not None:
            assert peaks.half / peaks.tf32 == pytest.approx(2, rel=0.03), name
            assert peaks.tf32 >= peaks.fp32, name
