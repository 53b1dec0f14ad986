"""One rank of a build, started by the deepspeed launcher: `--module benchmarks.building.worker FILE`.

FILE holds the options of the command line and of one case. Rank 0 writes the row of the slowest or largest rank.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from maskmatch_scale.engine import setup
from maskmatch_scale.engine.build import build_engine
from maskmatch_scale.engine.ema import build_teacher
from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.precision import weights_dtype
from maskmatch_scale.engine.sharding import shard_deferred
from maskmatch_scale.engine.zero import deepspeed_config
from maskmatch_scale.method.maskmatch import MaskMatch
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.models.deferred import build_deferred
from maskmatch_scale.recipe import Recipe, parse_recipe

MB = 1e6


def _recipe(options: dict[str, Any]) -> Recipe:
    return parse_recipe(
        {
            "data": {"root": "none"},
            "model": {"backbone": options["backbone"]},
            "engine": {"zero_stage": 3, "precision": options["precision"], "threads": 1},
            "run": {"dir": "none", "steps": 1},
        }
    )


def _build(options: dict[str, Any]) -> Segmenter:
    return build_segmenter(
        options["backbone"],
        options["classes"],
        pretrained=options["file"],
        image_size=options["image_size"],
        backbone_options=options["backbone_options"],
    )


class Memory:
    """Resident memory of this process above what it had when this was made, in MB."""

    def __init__(self) -> None:
        self._base = _status("VmRSS")
        self.peak()

    def peak(self) -> float:
        """The largest since the last call, as the kernel counted it."""
        peak = _status("VmHWM") - self._base
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
        return peak

    def now(self) -> float:
        """What is resident now."""
        return _status("VmRSS") - self._base


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / MB for line in lines if line.startswith(f"{name}:"))


def main(file: Path) -> None:
    """Build as a run does, and measure after each part."""
    options = json.loads(file.read_text())
    recipe = _recipe(options)
    runtime = setup.start(Place.from_environment(), recipe.engine)
    # What a first model and engine import and set up is not memory of weights.
    _whole_run(options | options["small"], recipe, runtime, None)
    memory = Memory()
    row = _whole_run(options, recipe, runtime, memory)
    rows: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(rows, row)
    if runtime.rank == 0:
        Path(options["result"]).write_text(json.dumps({key: max(row[key] for row in rows) for key in row}))
    dist.barrier()


def _whole_run(options: dict[str, Any], recipe: Recipe, runtime: Any, memory: Memory | None) -> dict[str, float]:
    peaks: dict[str, float] = {}
    began = time.process_time()

    def part(name: str, do: Callable[[], Any]) -> Any:
        done = do()
        if memory is not None:
            peaks[f"{name}_peak_mb"] = memory.peak()
        return done

    torch.manual_seed(0)
    if options["deferred"]:
        student, weights = build_deferred(lambda: _build(options))
        student.deferred = weights
    else:
        student = _build(options)
    part("model", lambda: None)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    block = _largest_block(student)
    average = copy.deepcopy(student)
    config = deepspeed_config(recipe, runtime.world_size)
    part("shard", lambda: shard_deferred(student, config, weights_dtype(recipe)))
    maskmatch = MaskMatch(student, recipe.method, 0, 255)
    engine = part("engine", lambda: build_engine(maskmatch, student, recipe, runtime))
    teacher = part("teacher", lambda: build_teacher(average, engine))
    shards = {"student": _shard_bytes(student), "teacher": _held_bytes(teacher)}
    row = {
        "parameters": parameters,
        "block_mb": block / MB,
        "states_mb": _state_bytes(engine._engine.optimizer) / MB,  # type: ignore[attr-defined]
        "shard_mb": sum(shards.values()) / MB,
        **peaks,
        "held_mb": memory.now() if memory is not None else 0.0,
        "cpu_s": time.process_time() - began,
    }
    engine._engine.destroy()  # type: ignore[attr-defined]
    return row


def _largest_block(student: Segmenter) -> int:
    """Bytes of fp32 weights of the largest block of the backbone."""
    model: Any = student.backbone
    blocks: list[nn.Module] = list(getattr(model, "blocks", None) or [b for s in model.stages for b in s.blocks])
    return max(sum(4 * parameter.numel() for parameter in block.parameters()) for block in blocks)


def _shard_bytes(module: nn.Module) -> int:
    """Bytes of this rank's shards of a module's weights."""
    return sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in module.parameters())  # type: ignore[attr-defined]


def _held_bytes(teacher: Any) -> int:
    """Bytes of this rank's shards of the teacher."""
    return sum(int(shard.values.nbytes) for shard in teacher._shards.values())


def _state_bytes(optimizer: Any) -> int:
    """Bytes of this rank's fp32 masters, gradients and Adam moments, which DeepSpeed makes with the engine."""
    states = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    tensors = [*optimizer.fp32_partitioned_groups_flat, optimizer.grad_partitions_flat_buffer, *states]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if torch.is_tensor(t)}
    return sum(sizes.values())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
