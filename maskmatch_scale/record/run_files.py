"""Reading a run directory: its settings, metrics and evaluations, as far as they were written.

All files are read as plain YAML and JSON, without the recipe's schema, so that a report on an old run does not fail
because a key was renamed since then. What a run has not written yet is empty.
"""

from __future__ import annotations

import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from maskmatch_scale.errors import UserError
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.redact import has_secret, redacted, redacted_values

RATES = ("images_per_s", "tokens_per_s", "mfu")
"""Figures that say how fast a step was."""

CURVES = ("loss", "loss_x", "loss_u", "loss_m", "lr", "coverage", *RATES)
"""Figures of a train record that are read."""


@dataclass(frozen=True)
class TrainCurves:
    """The train records, one entry for each step."""

    steps: NDArray[np.int64]
    """(n,), ascending."""
    values: Mapping[str, NDArray[np.float64]]
    """One (n,) array for each of :data:`CURVES`; NaN where a figure was switched off, not recorded or not finite."""


@dataclass(frozen=True)
class Score:
    """One evaluation of one set of weights on one split. Figures are 0–1, or None if not recorded or not finite."""

    split: str
    weights: str
    """``ema`` or ``student``."""
    step: int | None
    miou: float | None
    pixel_accuracy: float | None
    iou: Mapping[str, float | None] = field(default_factory=dict)
    """IoU by class, None for a class that neither labels nor predictions contain. Empty for evaluations in training."""
    inference: str = ""
    """How images were predicted, in words; empty for evaluations in training, which go by the recipe."""


@dataclass(frozen=True)
class Save:
    """A checkpoint record. Times are seconds of rank 0, None if not recorded."""

    step: int
    copy_s: float | None
    """How long a step waited for the copy."""
    wait_s: float | None
    """How long a step waited for the checkpoint before."""
    write_s: float | None
    bytes: float | None
    error: str | None
    """Why it could not be written, without passwords and tokens; None: it was."""


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run directory."""

    path: Path
    recipe_text: str
    """`recipe.yaml`, without the passwords and tokens of its addresses."""
    settings: Mapping[str, object]
    """The recipe, flat: ``{"method.mask.keep": 0.3, "method.scales": [0.5, 1.0], …}``."""
    train: TrainCurves
    progress: tuple[Score, ...]
    """Evaluations during training, steps ascending."""
    scores: tuple[Score, ...]
    """The newest evaluation of each split and weights, of ``evaluation/`` or training, by :func:`split_rank`."""
    saves: tuple[Save, ...]
    """All checkpoint records, of all starts, as they come in the file."""
    best: tuple[str, float] | None
    """The best checkpoint that is there, by name, and its mIoU on ``dev``; from the file `best`."""
    frozen_teacher: str | None
    """Name and step of the model that labels the unlabelled images; None: the average does, or no checkpoint says so
    yet. From the newest checkpoint."""
    fetched_mb: float
    """10⁶ bytes of shards that rank 0 has fetched from other machines, of all train records."""
    closing: Mapping[str, object] | None
    """``summary.json``, which is written when training ends; None before that."""


def read_run(path: Path) -> RunFiles:
    """Read a run directory.

    Raises:
        UserError: the folder is not a run directory, or one of its files cannot be read; the message names it.
    """
    folder = RunFolder(path)
    recipe = folder.recipe
    if not recipe.is_file():
        raise UserError(f"{path}: not a run directory (it has no recipe.yaml); give a folder that run.dir named")
    recipe_text, settings = _read_recipe(recipe)
    metrics = _read_metrics(folder.metrics)
    closing = folder.summary
    return RunFiles(
        path=path,
        recipe_text=recipe_text,
        settings=settings,
        train=metrics.train,
        progress=metrics.progress,
        scores=_newest(metrics.progress + tuple(_read_evaluations(folder.evaluations))),
        saves=metrics.saves,
        best=_best_checkpoint(folder.checkpoints),
        frozen_teacher=_frozen_teacher(folder.checkpoints),
        fetched_mb=metrics.fetched_mb,
        closing=_read_object(closing) if closing.is_file() else None,
    )


def split_rank(split: str) -> tuple[int, str]:
    """Sort key of splits: ``dev`` comes last, because hyper-parameters were chosen on it."""
    return {"val": 0, "val_font": 1, "dev": 3}.get(split, 2), split


def number(value: object) -> float | None:
    """``value`` as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _read_recipe(path: Path) -> tuple[str, dict[str, object]]:
    """The recipe as YAML and flat, without the passwords and tokens of its addresses."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a mapping of sections")
    if has_secret(content):
        content = redacted_values(content)
        text = OmegaConf.to_yaml(OmegaConf.create(content))
    return text, dict(_flat(content))


def _flat(section: Mapping[object, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _best_checkpoint(folder: Path) -> tuple[str, float] | None:
    """The first line of `best` that names a checkpoint that is there; the file is written by checkpoints/keeping.py."""
    best = folder / "best"
    lines = best.read_text(encoding="utf-8", errors="replace").splitlines() if best.is_file() else []
    for name, _, miou in (line.partition(" ") for line in lines):
        with suppress(ValueError):
            if (folder / name).is_dir():
                return name, float(miou)
    return None


def _frozen_teacher(folder: Path) -> str | None:
    """Name and step by the `state.json` of the checkpoint that `latest` names (training/frozen_teacher.py).

    A checkpoint that cannot be read, or is removed meanwhile, is no reason to show nothing of a run.
    """
    with suppress(OSError, ValueError, TypeError, KeyError):
        latest = (folder / "latest").read_text(encoding="utf-8").strip()
        facts = json.loads((folder / latest / "state.json").read_text(encoding="utf-8"))["frozen_teacher"]
        return f"{facts['name']}, step {facts['step']}"
    return None


@dataclass(frozen=True)
class _Metrics:
    train: TrainCurves
    progress: tuple[Score, ...]
    saves: tuple[Save, ...]
    fetched_mb: float


def _read_metrics(path: Path) -> _Metrics:
    """The records of ``metrics.jsonl``.

    A run that was killed and resumed from an older checkpoint repeats steps, and the later records count. So a train
    record of step s replaces all records for steps ≥ s that come before it in the file.
    """
    # Arrays of C doubles, not a list of records, because a run of a week has a million records.
    steps = array("q")
    columns = {name: array("d") for name in CURVES}
    progress: dict[tuple[int, str, str], Score] = {}
    saves = []
    fetched_mb = 0.0
    for record in _records(path):
        step = record.get("step")
        if not isinstance(step, int):
            continue
        if record.get("kind") == "eval":
            score = _score(record, split="dev", weights="ema")
            progress[step, score.split, score.weights] = score
        elif record.get("kind") == "checkpoint":
            saves.append(_save(step, record))
        elif record.get("kind") == "train":
            if steps and step <= steps[-1]:
                kept = bisect_left(steps, step)
                del steps[kept:]
                for column in columns.values():
                    del column[kept:]
                progress = {key: score for key, score in progress.items() if key[0] < step}
            steps.append(step)
            for name, column in columns.items():
                value = number(record.get(name))
                column.append(math.nan if value is None else value)
            fetched = record.get("fetched")
            if isinstance(fetched, dict):
                fetched_mb += number(fetched.get("mb")) or 0.0
    curves = TrainCurves(
        steps=np.array(steps, dtype=np.int64),
        values={name: np.array(column, dtype=np.float64) for name, column in columns.items()},
    )
    return _Metrics(curves, tuple(progress[key] for key in sorted(progress)), tuple(saves), fetched_mb)


def _save(step: int, record: Mapping[str, object]) -> Save:
    copy_s, wait_s, write_s, size = (number(record.get(name)) for name in ("copy_s", "wait_s", "write_s", "bytes"))
    error = record.get("error")
    return Save(step, copy_s, wait_s, write_s, size, None if error is None else redacted(str(error)))


def _records(path: Path) -> Iterator[dict[str, object]]:
    """The complete lines of a JSON-lines file. A kill leaves half a line, at the end or where a resumed run began."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                yield record


def _read_evaluations(folder: Path) -> Iterator[Score]:
    for path in sorted(folder.glob("*.json")):
        split, _, weights = path.stem.rpartition("-")
        yield _score(_read_object(path), split=split, weights=weights)


def _read_object(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def _score(record: Mapping[str, object], split: str, weights: str) -> Score:
    """A score from an eval record or evaluation file; ``split`` and ``weights`` are used if the record has none."""
    step, iou = record.get("step"), record.get("iou")
    return Score(
        split=str(record.get("split", split)),
        weights=str(record.get("weights", weights)),
        step=step if isinstance(step, int) else None,
        miou=number(record.get("miou")),
        pixel_accuracy=number(record.get("pixel_accuracy")),
        iou={str(name): number(value) for name, value in iou.items()} if isinstance(iou, Mapping) else {},
        inference=str(record.get("inference", "")),
    )


def _newest(scores: tuple[Score, ...]) -> tuple[Score, ...]:
    """The score with the largest step for each split and weights; of equal or unknown steps the later one counts."""
    newest: dict[tuple[str, str], Score] = {}
    for score in scores:
        before = newest.get((score.split, score.weights))
        if before is None or before.step is None or score.step is None or score.step >= before.step:
            newest[score.split, score.weights] = score
    return tuple(sorted(newest.values(), key=lambda score: (split_rank(score.split), score.weights)))
