"""What every benchmark shares: timing variants against each other, counting, memory, machine, and files."""

from __future__ import annotations

import json
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

ROOT = Path(__file__).resolve().parent.parent

Run = Callable[[], object]
"""A variant: one pass of it."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant, one entry a repeat."""

    seconds: tuple[float, ...]

    @property
    def minimum(self) -> float:
        """The least disturbed repeat."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Far above the minimum: the machine was disturbed, trust the run less."""
        return median(self.seconds)


def time_interleaved(variants: Mapping[str, Run], repeats: int, device: torch.device) -> dict[str, Timing]:
    """Time variants in turn: one round of warm-up, then `repeats` rounds of every variant once.

    A slow minute of a shared machine then falls on all variants alike. The order is drawn anew every round (the same
    draws in every run), so that none always finds the cache as the same neighbour left it.

    Args:
        variants: what to time; each leaves nothing behind for the next.
        repeats: rounds that count.
        device: decides the clock. CPU: the process's CPU time, which other processes cannot use up. CUDA: wall time
            between synchronisations.
    """
    order = random.Random(0)
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(repeats + 1):
        for name in order.sample(names, len(names)):
            started = _now(device)
            variants[name]()
            elapsed = _now(device) - started
            if round_ > 0:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def count_gmacs(run: Run) -> float:
    """Multiply–adds of one pass in 10⁹: matrix products, attention, convolutions; nothing elementwise.

    Counted where torch dispatches them, with two corrections: attention by its plain formula, because the counter does
    not see the CPU's flash kernel, and the backward of grouped convolutions, which torch 2.14 counts as if ungrouped
    (SegFormer-b2: forward + backward would be 12 forwards).
    """
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops}
    )
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return float(counter.get_total_flops() / 2e9)


def _convolution_backward_flops(
    grad_out_shape: Sequence[int],
    x_shape: Sequence[int],
    w_shape: Sequence[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    """The gradients of input and of weight each take the forward's products once more, grouped or not."""
    forward = conv_flop_count(list(x_shape), list(w_shape), list(grad_out_shape), transposed)
    return int(forward * (output_mask[0] + output_mask[1]))


def peak_mb(run: Run, held: Sequence[torch.Tensor], device: torch.device) -> float:
    """Tensor memory in 10⁶ bytes: `held`, plus the most that one pass holds at once beside it.

    CPU: torch's own allocations and frees, in order, from its profiler. CUDA: `torch.cuda.max_memory_allocated` less
    what was allocated before. Neither sees workspaces that oneDNN or cuDNN take for themselves, nor the interpreter.

    Args:
        run: the pass.
        held: weights, buffers and inputs, which are there before and after it.
        device: where it runs.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        most = torch.cuda.max_memory_allocated(device) - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        events = profiler.profiler.kineto_results.events()  # the public view merges memory events into operators
        now = most = 0
        for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
            now += change
            most = max(most, now)
    return (most + sum(tensor.nbytes for tensor in held)) / 1e6


def describe_machine(device: torch.device, sources: Sequence[str]) -> dict[str, Any]:
    """The machine, the versions and the commit of a run; no host name and no path.

    Args:
        device: where the variants run.
        sources: files or folders of the repository that the figures depend on; the commit is marked if they differ.
    """
    return {
        "cpu": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "clock": "process time" if device.type == "cpu" else "wall time between synchronisations",
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "transformers")},
        "commit": _commit(sources),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit(sources: Sequence[str]) -> str | None:
    """Short hash, with a mark if `sources` have changed since; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", *sources)
        return git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def check_out(out: Path) -> None:
    """Make the folder of `--out`, before anything is measured.

    Raises:
        ValueError: it is no .json file, or cannot be written.
    """
    if out.suffix != ".json":
        raise ValueError(f"--out: {out} must end in .json; the table and the plot are written beside it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out: {out.parent} cannot be made: {error.strerror}") from error
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ValueError(f"--out: {out} cannot be written; it is a folder, or you lack the right")


def write_json(out: Path, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `{"machine": …, "rows": […]}`, one row a line."""
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    head = json.dumps(machine, ensure_ascii=False, indent=1).replace("\n", "\n ")
    out.write_text(f'{{\n "machine": {head},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")


def markdown(title: str, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A page with the machine in a line and the rows in a table."""
    facts = " · ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items() if value is not None)
    table = [columns, ["---"] * len(columns), *([_cell(row[column]) for column in columns] for row in rows)]
    return "\n".join([f"# {title}", "", facts, "", *(f"| {' | '.join(line)} |" for line in table), ""])


def _cell(value: object) -> str:
    """Three significant figures, but no power of ten."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
