"""Writing and reading checkpoints. A checkpoint is complete or not there at all.

    checkpoints/
      latest                    name of the newest complete checkpoint
      step-00000400/
        engine/                 pieces of masters, moments, average and buffers, a file a rank
        student.safetensors     whole fp32 weights, for evaluation and export
        ema.safetensors         whole fp32 teacher
        stream.json             what the training stream continues from (data/batches/training.py), one for all ranks
        state.json              step, ranks, engine, ZeRO stage, precision, seconds spent so far

All ranks write into `.step-00000400.writing`. The folder is renamed when every rank has finished, so a crash leaves the
previous checkpoint in place. Our own files are flushed to the disk before the rename, the engine's are not. Every
random generator is made from the seed and a position, so there is no random state to save.

Decision: docs/decisions/0007-no-files-of-random-state.md.
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
    """There is no checkpoint to continue from, or it does not fit the run; the message says what to do."""


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
        counts: state of the callbacks, such as `seconds` and `cpu_s`: JSON values.
        engine: of this rank.
        teacher: of this rank.
        runtime: this rank.
        stream: state of the training batches, the same on every rank.

    Returns:
        The folder of the checkpoint.
    """
    folder = run.checkpoints / f"step-{step:08d}"
    writing = folder.with_name(f".{folder.name}.writing")
    if runtime.rank == 0:
        for leftover in folder.parent.glob(".step-*.writing"):
            shutil.rmtree(leftover)
        writing.mkdir(parents=True)
        (writing / "engine").mkdir()
    runtime.barrier()
    pieces = [(p.name, p.shape, p.start, p.values.cpu()) for p in (*engine.pieces(), *teacher.pieces())]
    torch.save((engine.progress(), pieces), writing / "engine" / f"rank-{runtime.rank}.pt")
    runtime.barrier()
    if runtime.rank == 0:
        stored = _StoredPieces(writing / "engine")
        for kind in ("student", "ema"):
            names = [name for name in stored.names() if name.startswith(f"{kind}/")]
            whole = {n.partition("/")[2]: stored.read(n).view(stored.shape(n)) for n in names}
            _save(whole, weights_file(writing, kind))
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
        The contents of its `state.json`.

    Raises:
        CheckpointError: it was written with another number of ranks, engine, ZeRO stage or precision, or is incomplete.
    """
    check_checkpoint(folder, engine.recipe, runtime.world_size)
    state = load_state(folder)
    try:
        stored = _StoredPieces(folder / "engine")
        engine.restore(stored, stored.progress)
        teacher.restore(stored)
    except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: its optimizer state does not fit this run ({type(error).__name__}: {error}); model, "
            "optim.head_lr_multiplier and optim.layer_decay must be as they were, and all of its files must be there"
        ) from error
    return state


def load_state(folder: Path) -> dict[str, Any]:
    """Read `state.json` of a checkpoint: `step`, the state of the callbacks, and the settings it was written with."""
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return state


def load_stream_state(folder: Path) -> dict[str, Any]:
    """Read `stream.json` of a checkpoint: the state of the training batches.

    Raises:
        CheckpointError: it cannot be read. Older versions, whose order of samples was another, wrote none.
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
    """Refuse a checkpoint that this run cannot continue. This reads one small file and builds nothing.

    Raises:
        CheckpointError: it was written with another number of ranks, engine, ZeRO stage or precision, or is incomplete.
    """
    state = load_state(folder)
    for name, now in _shape(recipe, world_size).items():
        if state.get(name) != now:
            raise CheckpointError(
                f"{folder}: written with {name}={state.get(name)}, this run has {now}; make them equal"
            )
    if not (folder / "engine").is_dir():
        raise CheckpointError(f"{folder}: its folder engine/ is missing; continue from another checkpoint")


def _shape(recipe: Recipe, world_size: int) -> dict[str, object]:
    """The settings that a checkpoint and the run that continues it must have in common."""
    engine = recipe.engine
    return {
        "world_size": world_size,
        "library": engine.library,
        "zero_stage": engine.zero_stage,
        "precision": engine.precision,
    }


def find_checkpoint(where: Path) -> Path:
    """Find the newest complete checkpoint.

    Args:
        where: a run directory, its folder `checkpoints`, or a checkpoint, which is returned as it is.

    Raises:
        CheckpointError: there is none.
    """
    if (where / "state.json").is_file():
        return where
    for folder in (RunFolder(where).checkpoints, where):
        if (folder / "latest").is_file():
            newest = folder / (folder / "latest").read_text().strip()
            if not (newest / "state.json").is_file():
                raise CheckpointError(
                    f"{folder / 'latest'} names {newest.name}, which is not there; give the path of another checkpoint"
                )
            return newest
    raise CheckpointError(f"{where}: there is no complete checkpoint here (a file `latest` or a folder step-XXXXXXXX)")


def weights_file(folder: Path, weights: str) -> Path:
    """The file of a checkpoint with the whole fp32 weights; ``weights`` is `ema` or `student`."""
    return folder / f"{weights}.safetensors"


def load_weights(folder: Path, weights: str) -> dict[str, Tensor]:
    """Whole fp32 weights of a checkpoint by name, on the CPU; ``weights`` is `ema` or `student`."""
    state: dict[str, Tensor] = load_file(weights_file(folder, weights))
    return state


class _StoredPieces:
    """The pieces of all ranks (`StoredState`), read into memory as whole tensors."""

    def __init__(self, folder: Path) -> None:
        self.progress: dict[str, Any] = {}
        self._pieces: dict[str, list[tuple[tuple[int, ...], int, Tensor]]] = {}
        for file in sorted(folder.glob("rank-*.pt")):
            self.progress, pieces = torch.load(file, mmap=True)
            for name, *piece in pieces:
                self._pieces.setdefault(name, []).append(tuple(piece))

    def names(self) -> list[str]:
        return list(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._pieces[name][0][0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        pieces = sorted(self._pieces[name], key=lambda piece: piece[1])
        return torch.cat([values for _, _, values in pieces])[start:stop]


def _save(state: dict[str, Tensor], path: Path) -> None:
    # safetensors refuses tensors that share memory or have gaps.
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
