"""What every benchmark shares: timing variants against each other, counting, memory, machine, and files."""

from __future__ import annotations

import json
import os
import platform
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from maskmatch_scale.planning.flops import convolution_backward_flops

ROOT = Path(__file__).resolve().parent.parent

Run = Callable[[], object]
"""One pass of a variant."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant, one entry for each repeat."""

    seconds: tuple[float, ...]
    """By the clock that counts: the process's CPU time on a CPU, wall time on a GPU."""
    wall: tuple[float, ...] = ()
    """Wall time; on a GPU the same as `seconds`."""

    @property
    def minimum(self) -> float:
        """Seconds of the fastest repeat, which was disturbed least."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Median seconds. Where it is far above the minimum, the machine was disturbed: trust the run less."""
        return median(self.seconds)

    @property
    def wall_minimum(self) -> float:
        """Wall time of the fastest repeat."""
        return min(self.wall)

    @property
    def wall_median(self) -> float:
        """Median wall time. Where it is far above `median`, other processes used the processor meanwhile."""
        return median(self.wall)


def time_interleaved(
    variants: Mapping[str, Run], repeats: int, device: torch.device, *, warmed_up: bool = False
) -> dict[str, Timing]:
    """Time variants in turn: one warm-up round, then `repeats` rounds. Each round runs every variant once.

    So a slow minute of a shared machine affects all variants alike. The order is drawn anew in every round (the same
    draws in every run), so that no variant always runs after the same other one and finds its cache contents.

    Args:
        variants: what to time; a run must leave nothing behind, such as gradients, that changes the next one.
        repeats: rounds that count.
        device: decides which clock counts. CPU: the process's CPU time, which does not contain that of other processes.
            CUDA: wall time between synchronisations. Both clocks are kept.
        warmed_up: every variant has already run, so no warm-up round is needed.
    """
    order = random.Random(0)
    names = list(variants)
    elapsed: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for round_ in range(int(warmed_up), repeats + 1):
        for name in order.sample(names, len(names)):
            counts, wall = _now(device)
            variants[name]()
            counts_after, wall_after = _now(device)
            if round_ > 0:
                elapsed[name].append((counts_after - counts, wall_after - wall))
    return {name: Timing(*map(tuple, zip(*pairs))) for name, pairs in elapsed.items()}


def _now(device: torch.device) -> tuple[float, float]:
    """Seconds by the clock that counts, and wall time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        wall = time.perf_counter()
        return wall, wall
    return time.process_time(), time.perf_counter()


def count_gmacs(run: Run) -> float:
    """Multiply–adds of one pass in 10⁹: matrix products, attention, convolutions; nothing elementwise.

    They are counted where torch dispatches them, with two corrections. Attention is counted by its plain formula,
    because the counter does not see the CPU's flash kernel. The backward of grouped convolutions is counted by a
    formula of our own, because torch 2.14 counts it as if they were not grouped (SegFormer-b2: forward + backward would
    be 12 forwards).
    """
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward_flops}
    )
    with sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return float(counter.get_total_flops() / 2e9)


def peak_mb(run: Run, held: Sequence[torch.Tensor], device: torch.device) -> float:
    """Tensor memory in 10⁶ bytes: `held`, plus the most that one pass allocates at once beside it.

    CPU: torch's own allocations and frees, in order, from its profiler. CUDA: `torch.cuda.max_memory_allocated` minus
    what was allocated before. Neither contains the workspaces of oneDNN or cuDNN, nor the interpreter.

    Args:
        run: the pass.
        held: weights, buffers and inputs, which exist before and after the pass.
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


GATHERS = frozenset(
    f"aten::{name}"
    for name in (
        *("index_select", "index", "gather", "cat", "scatter", "scatter_", "scatter_add", "scatter_add_"),
        *("_index_put_impl_", "index_put", "index_put_", "index_add", "index_add_"),
    )
)
"""Operators that move tokens by index, and the concatenations that append a row of zeros for them to point at."""


def gather_share(run: Run, device: torch.device) -> float | None:
    """Share of one pass's time, 0–1, that goes into `GATHERS`; None if the profiler sees no time at all.

    Measured by torch's profiler, as the time of each operator without the operators that it calls. CPU: CPU time. CUDA:
    time of the kernels. Every `cat` is counted, also those of the library (a ViT's class token). Not counted: the index
    arithmetic before a gather, and cache misses that it causes later.

    Args:
        run: the pass.
        device: where it runs.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    gathers = total = 0.0
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:  # the kernels, whose time their operators have already
            continue
        spent = float(event.self_device_time_total if cuda else event.self_cpu_time_total)
        total += spent
        gathers += spent if event.key in GATHERS else 0.0
    return gathers / total if total else None


def describe_machine(device: torch.device, sources: Sequence[str]) -> dict[str, Any]:
    """The machine, the versions, the commit and the sources of a run; no host name and no path.

    Args:
        device: where the variants run.
        sources: files or folders of the repository on which the figures depend; if they have changed, the commit is
            marked. A rebase gives their commit another hash, but not them: so their own hashes are kept too.
    """
    return {
        "cpu": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "driver": _driver_version() if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "clock": "process time" if device.type == "cpu" else "wall time between synchronisations",
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "timm", "transformers")},
        "commit": _commit(sources),
        "sources": _source_hashes(sources),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver_version() -> str | None:
    """Of NVIDIA's driver, as its own tool says it; None if it does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0] if lines else None


def _commit(sources: Sequence[str]) -> str | None:
    """Short hash, with a mark if `sources` have changed since; None outside a checkout."""
    try:
        changed = _git("status", "--porcelain", "--", *sources)
        return _git("rev-parse", "--short", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _source_hashes(sources: Sequence[str]) -> str | None:
    """`FOLDER HASH, …`: what git calls the content of each of `sources` at this commit; None outside a checkout."""
    try:
        return ", ".join(f"{source} {_git('rev-parse', '--short', f'HEAD:{source}')}" for source in sources)
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def say(line: str) -> None:
    """A line of progress, or of what is wrong, on standard error."""
    print(line, file=sys.stderr, flush=True)


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


def write_json(
    out: Path, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], **more: Sequence[Mapping[str, Any]]
) -> None:
    """Write `{"machine": …, "rows": […]}`, one row a line; further lists of rows go after it under their own names."""
    parts = ['"machine": ' + json.dumps(machine, ensure_ascii=False, indent=1).replace("\n", "\n ")]
    for name, entries in {"rows": rows, **more}.items():
        lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in entries)
        parts.append(f'"{name}": [\n  {lines}\n ]' if entries else f'"{name}": []')
    out.write_text("{\n " + ",\n ".join(parts) + "\n}\n", encoding="utf-8")


def markdown(title: str, machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A page with the machine in a line and the rows in a table."""
    return "\n".join([f"# {title}", "", machine_line(machine), "", markdown_table(rows, columns)])


def machine_line(machine: Mapping[str, Any]) -> str:
    """The facts that are known, in a line."""
    return " · ".join(f"{key.replace('_', ' ')} {value}" for key, value in machine.items() if value is not None)


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows' `columns` as a table."""
    lines = [columns, ["---"] * len(columns), *([_cell(row[column]) for column in columns] for row in rows)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), ""])


def _cell(value: object) -> str:
    """Three significant figures, from 100 on a whole number; a dash for what is not known."""
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def launch(worker: str, options: Mapping[str, Any], ranks: int, device: torch.device) -> Any:
    """What ``worker`` writes to the file `result` of its options, run on ranks under the deepspeed launcher.

    Args:
        worker: a module, which is given the name of a JSON file with the options.
        options: of the worker.
        ranks: on a CPU one thread each, on CUDA one GPU each.
        device: of its type are the devices of the ranks.

    Raises:
        RuntimeError: a rank failed; its last lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, result = Path(folder) / "options.json", Path(folder) / "result.json"
        file.write_text(json.dumps({**options, "result": str(result)}))
        command = deepspeed_command(ranks, device, worker, file)
        done = subprocess.run(
            command, cwd=ROOT, env=launch_environment(device), capture_output=True, text=True, check=False
        )
        if done.returncode or not result.is_file():
            raise RuntimeError(f"the launch failed:\n{(done.stdout + done.stderr)[-3000:]}")
        return json.loads(result.read_text())


COMMANDS = Path(sys.executable).parent
"""Where the launchers of this environment are."""

_OF_A_RUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def launch_environment(device: torch.device) -> dict[str, str]:
    """Of a launcher's processes: this environment's commands and this checkout first, one thread a rank.

    What a run within this process has set is left out.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_RUN} | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    return environment | ({"DS_ACCELERATOR": "cpu"} if device.type == "cpu" else {})


def deepspeed_command(ranks: int, device: torch.device, module: str, *arguments: object) -> list[str]:
    """The command that starts a module on ranks under the deepspeed launcher."""
    devices = f"--num_{'accelerators' if device.type == 'cpu' else 'gpus'}={ranks}"
    command = [COMMANDS / "deepspeed", devices, "--no_local_rank", f"--master_port={free_port()}", "--module", module]
    return list(map(str, [*command, *arguments]))


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
