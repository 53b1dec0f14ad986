"""Checkpoints that are whole or not there.

    checkpoints/
      latest                    name of the newest complete checkpoint
      step-00000400/
        engine/                 the engine's own files: masters and optimizer state, under ZeRO each rank its shard
        student.safetensors     whole fp32 weights, for evaluation and export
        ema.safetensors         whole fp32 teacher
        buffers/                with `model.batchnorm: per_rank`: each rank's own running statistics
        stream.json             what the training stream continues from (data/batches/training.py), one for all ranks
        state.json              step, ranks, engine, ZeRO stage, precision, seconds spent so far

Everything is written into `.step-00000400.writing` and renamed when every rank has finished, so that a crash leaves the
checkpoint before it in place; our own files are flushed to the disk before the rename, the engine's are not. Every
generator is made from the seed and a position: there is no random state to save.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskmatch_scale.engine.protocol import Engine, StoredTeacher
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.errors import UserError
from maskmatch_scale.files import write_whole
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.record.run_folder import RunFolder


class CheckpointError(UserError):
    """No checkpoint to continue from, or one that does not fit; the message says what to do."""


def save_checkpoint(
    run: RunFolder,
    step: int,
    counts: Mapping[str, Any],
    engine: Engine,
    teacher: StoredTeacher,
    runtime: Runtime,
    stream: Mapping[str, Any],
) -> Path:
    """Write `checkpoints/step-XXXXXXXX` after optimizer step ``step``; all ranks call it together.

    Args:
        run: run directory.
        step: optimizer steps taken.
        counts: what callbacks keep, such as `seconds` and `cpu_s`: JSON values.
        engine: of this rank.
        teacher: of this rank.
        runtime: this rank.
        stream: state of the training stream, the same on every rank.
    """
    folder = run.checkpoints / f"step-{step:08d}"
    writing = folder.with_name(f".{folder.name}.writing")
    if runtime.rank == 0:
        for leftover in folder.parent.glob(".step-*.writing"):
            shutil.rmtree(leftover)
        writing.mkdir(parents=True)
        (writing / "engine").mkdir()
    runtime.barrier()
    engine.save(writing / "engine")
    if _own_buffers(engine, runtime):
        (writing / "buffers").mkdir(exist_ok=True)
        _save(_buffers(engine, teacher), writing / "buffers" / f"rank-{runtime.rank}.safetensors")
    # Rank 0 alone keeps what is gathered, and one of the two at a time.
    student = engine.full_fp32_parameters(keep=runtime.rank == 0)
    if runtime.rank == 0:
        persistent = set(engine.student.state_dict())
        student |= {name: buffer.cpu() for name, buffer in engine.student.named_buffers() if name in persistent}
        _save(student, writing / "student.safetensors")
    del student
    average = teacher.full_state(keep=runtime.rank == 0)
    if runtime.rank == 0:
        _save(average, writing / "ema.safetensors")
        write_whole(writing / "stream.json", json.dumps(stream))
        state = {**counts, "step": step, **_shape(engine.recipe, runtime.world_size), "torch": torch.__version__}
        write_whole(writing / "state.json", json.dumps(state, indent=1))
    runtime.barrier()
    if runtime.rank == 0:
        replaced = folder.with_name(f".{folder.name}.replaced")
        if folder.exists():
            folder.rename(replaced)
        writing.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
        write_whole(folder.parent / "latest", folder.name)
    runtime.barrier()
    return folder


def load_checkpoint(folder: Path, engine: Engine, teacher: StoredTeacher, runtime: Runtime) -> dict[str, Any]:
    """Restore student, optimizer and teacher bit for bit; all ranks call it together.

    Returns:
        Its state: `step`, `seconds`, `cpu_s` and what it was written with.

    Raises:
        CheckpointError: written by another number of ranks, engine, ZeRO stage or precision, or not whole.
    """
    check_checkpoint(folder, engine.recipe, runtime.world_size)
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    try:
        engine.load(folder / "engine")
    except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: its optimizer state does not fit this run ({type(error).__name__}: {error}); model, "
            "optim.head_lr_multiplier and optim.layer_decay must be as they were, and every file of it there"
        ) from error
    teacher.load_full_state(load_file(folder / "ema.safetensors"))
    if _own_buffers(engine, runtime):
        for name, value in load_file(folder / "buffers" / f"rank-{runtime.rank}.safetensors").items():
            _buffers(engine, teacher)[name].copy_(value)
    return state


def load_stream_state(folder: Path) -> dict[str, Any]:
    """State of the training stream.

    Raises:
        CheckpointError: there is none: an older version wrote the checkpoint, whose order of samples was another.
    """
    try:
        state: dict[str, Any] = json.loads((folder / "stream.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: its stream.json cannot be read ({type(error).__name__}); a checkpoint of an older version "
            "cannot be continued exactly: start a new run from its weights (model.pretrained)"
        ) from None
    return state


def check_checkpoint(folder: Path, recipe: Recipe, world_size: int) -> None:
    """Refuse a checkpoint that this run cannot continue; reads only a small file, before anything is built.

    Raises:
        CheckpointError: written by another number of ranks, engine, ZeRO stage or precision, or not whole.
    """
    state = json.loads((folder / "state.json").read_text())
    for name, now in _shape(recipe, world_size).items():
        if state.get(name) != now:
            raise CheckpointError(
                f"{folder}: written with {name}={state.get(name)}, this run has {now}; make them equal"
            )
    if not (folder / "engine").is_dir():
        raise CheckpointError(f"{folder}: its folder engine/ is missing; continue from another checkpoint")


def _shape(recipe: Recipe, world_size: int) -> dict[str, object]:
    """What a checkpoint and the run that continues it must have in common."""
    engine = recipe.engine
    return {
        "world_size": world_size,
        "library": engine.library,
        "zero_stage": engine.zero_stage,
        "precision": engine.precision,
    }


def _own_buffers(engine: Engine, runtime: Runtime) -> bool:
    """Whether ranks have running statistics that differ."""
    return engine.recipe.model.batchnorm == "per_rank" and runtime.world_size > 1


def _buffers(engine: Engine, teacher: StoredTeacher) -> dict[str, Tensor]:
    """This rank's buffers of student and teacher."""
    both = {"student": engine.student, "teacher": teacher.module}
    return {f"{who}.{name}": buffer for who, module in both.items() for name, buffer in module.named_buffers()}


def find_checkpoint(where: Path) -> Path:
    """The complete checkpoint meant by a run directory, its `checkpoints` folder, or a checkpoint itself.

    Raises:
        CheckpointError: there is none.
    """
    if (where / "state.json").is_file():
        return where
    for folder in (RunFolder(where).checkpoints, where):
        if (folder / "latest").is_file():
            newest = folder / (folder / "latest").read_text().strip()
            if not (newest / "state.json").is_file():
                raise CheckpointError(f"{folder / 'latest'} names {newest.name}, which is not there; name another one")
            return newest
    raise CheckpointError(f"{where}: no complete checkpoint here (a `latest` file or a step-XXXXXXXX folder)")


def load_weights(folder: Path, weights: str) -> dict[str, Tensor]:
    """Whole fp32 weights of a checkpoint; ``weights`` is `ema` or `student`."""
    state: dict[str, Tensor] = load_file(folder / f"{weights}.safetensors")
    return state


def _save(state: dict[str, Tensor], path: Path) -> None:
    # safetensors refuses tensors that share memory or have gaps.
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
