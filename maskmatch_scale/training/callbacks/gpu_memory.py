"""GPU memory of this rank: allocated and reserved after each step, and the most that was allocated within it."""

from __future__ import annotations

from typing import Any

import torch

from maskmatch_scale.training.callbacks.base import Callback
from maskmatch_scale.training.run import Run
from maskmatch_scale.training.step import StepFigures


class GpuMemory(Callback):
    """Adds `gpu_allocated_gb`, `gpu_reserved_gb` and `gpu_peak_gb` (10⁹ bytes) to the figures; None without a GPU.

    They are counters that torch's allocator keeps on the host, so reading them does not wait for the device. What other
    libraries allocate by themselves, such as NCCL's buffers, is not in them.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._on_gpu = run.runtime.device.type == "cuda"
        self._most = float(run.resumed.get("gpu_peak_gb") or 0.0)

    def before_step(self, step: int) -> None:
        """From here on counts what is the most."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self.run.runtime.device)

    def after_step(self, done: int, figures: StepFigures) -> None:
        """Add the figures of this step."""
        figures.known |= dict.fromkeys(("gpu_allocated_gb", "gpu_reserved_gb", "gpu_peak_gb"))
        if self._on_gpu:
            counters = torch.cuda.memory_stats(self.run.runtime.device)
            peak_gb = counters["allocated_bytes.all.peak"] / 1e9
            figures.known["gpu_allocated_gb"] = counters["allocated_bytes.all.current"] / 1e9
            figures.known["gpu_reserved_gb"] = counters["reserved_bytes.all.current"] / 1e9
            figures.known["gpu_peak_gb"] = peak_gb
            self._most = max(self._most, peak_gb)

    def state(self) -> dict[str, Any]:
        """`gpu_peak_gb`: the most of all steps, on the rank that had most; all ranks call it together."""
        runtime = self.run.runtime
        if not self._on_gpu:
            return {"gpu_peak_gb": None}
        most = torch.zeros(runtime.world_size, dtype=torch.float64, device=runtime.device)
        most[runtime.rank] = self._most
        return {"gpu_peak_gb": float(runtime.sum_over_ranks(most).max())}
