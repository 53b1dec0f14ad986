"""GPU memory: counters of torch's allocator, reset before every step."""

from types import SimpleNamespace

import torch

from maskmatch_scale.training.callbacks.gpu_memory import GpuMemory
from maskmatch_scale.training.step import StepFigures


def test_counters_of_the_allocator(monkeypatch):
    counters = {"allocated_bytes.all.current": 2 * 10**9, "reserved_bytes.all.current": 5 * 10**9}
    events = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: events.append("reset"))
    peaks = iter([4 * 10**9, 3 * 10**9])
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: counters | {"allocated_bytes.all.peak": next(peaks)})
    runtime = SimpleNamespace(device=torch.device("cuda"), rank=1, world_size=3)
    callback = GpuMemory(SimpleNamespace(runtime=runtime, resumed={"gpu_peak_gb": None}))
    found = []
    for step in range(2):
        callback.before_step(step)
        assert events == ["reset"] * (step + 1)
        figures = StepFigures()
        callback.after_step(step + 1, figures)
        found.append(figures.known)
    assert found[0] == {"gpu_allocated_gb": 2.0, "gpu_reserved_gb": 5.0, "gpu_peak_gb": 4.0}
    assert found[1]["gpu_peak_gb"] == 3.0
    # Every rank puts its own most into its own place; the others are added here.
    runtime.device = torch.device("cpu")
    runtime.sum_over_ranks = lambda most: most + torch.tensor([6.0, 0.0, 1.0])
    assert callback.state() == {"gpu_peak_gb": 6.0}
    runtime.sum_over_ranks = lambda most: most + torch.tensor([1.0, 0.0, 1.0])
    assert callback.state() == {"gpu_peak_gb": 4.0}


def test_nothing_without_a_gpu():
    callback = GpuMemory(SimpleNamespace(runtime=SimpleNamespace(device=torch.device("cpu")), resumed={}))
    figures = StepFigures()
    callback.before_step(0)
    callback.after_step(1, figures)
    assert figures.known == dict.fromkeys(("gpu_allocated_gb", "gpu_reserved_gb", "gpu_peak_gb"))
    assert callback.state() == {"gpu_peak_gb": None}
