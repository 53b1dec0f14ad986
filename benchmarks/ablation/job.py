"""A cell of the grid (one arm, one draw of labels) as files: what it is to run, and what it found.

WORK/<arm>/draw-<N>/job.json       what to run
                    run/           run directory
                    progress       steps taken and steps in all, as it goes
                    log.txt        output of the process
                    result.json    what it found; there when it has finished
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.ablation.sources import DIGITS, measuring_hash, sources_hash
from maskmatch_scale.errors import UserError
from maskmatch_scale.files import sha256, write_whole
from maskmatch_scale.recipe import Recipe, parse_recipe

UNCOMPARED = {"machine", "title", "group", "keep_checkpoints"}
"""What of a job decides no figure."""
EQUAL_STEPS, EQUAL_COST, END = "equal steps", "equal cost", "end"
"""The marks at which a run is evaluated on all splits."""


@dataclass(frozen=True)
class Job:
    """What a cell is to run."""

    task: str
    arm: str
    title: str
    """Of the arm."""
    group: str
    """Of the arm."""
    draw: int
    recipe: dict[str, Any]
    marks: dict[str, int]
    """Steps at which the teacher is evaluated on all splits, by name; the last one is the run's length."""
    evaluate_every: int
    """Steps between evaluations on `dev`."""
    splits: tuple[str, ...]
    """Evaluated at the marks, besides `dev`."""
    eval_images: int | None
    """Images of each split that are evaluated, evenly spaced; None: all."""
    curve_images: int | None
    """The same of `dev` for the points of the curve."""
    pseudo_images: int
    """At most so many training images without labels of this draw, on which pseudo-labels are checked."""
    cost: dict[str, float] | None
    """Of a step after the burn-in `cpu_s` and `gmacs`, of one in it `burn_in_cpu_s`; None: not measured."""
    identity: dict[str, str]
    """What must be the same in all cells of a work folder: hashes of code, data and weights."""
    machine: dict[str, Any]
    variant: str | None = None
    """Of the arm."""
    start: str | None = None
    """What the draw starts from, in words; None: from first weights."""
    keep_checkpoints: bool = False
    """Whether the checkpoints stay when the cell has finished."""

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return max(self.marks.values())

    def parsed(self) -> Recipe:
        """The recipe."""
        return parse_recipe(self.recipe, f"{self.arm}, draw {self.draw}")

    def facts(self) -> dict[str, Any]:
        """What decides the figures: everything but paths, machine, loader processes and checkpoints."""
        recipe = json.loads(json.dumps(self.recipe))
        for section, key in (("run", "dir"), ("run", "checkpoint_every"), ("data", "root"), ("data", "workers")):
            recipe[section].pop(key, None)
        for source in recipe["data"].get("unlabelled", ()):
            source.pop("root")
        recipe["model"].pop("pretrained", None)
        facts = {name: value for name, value in asdict(self).items() if name not in UNCOMPARED}
        as_json: dict[str, Any] = json.loads(json.dumps({**facts, "recipe": recipe}))  # lists for tuples
        return as_json

    def write(self, folder: Path) -> None:
        """Write `job.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "job.json", json.dumps(asdict(self), indent=1, ensure_ascii=False))


def read_job(path: Path) -> Job:
    """Read `job.json`.

    Raises:
        UserError: it cannot be read, or another version wrote it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Job(**{**content, "splits": tuple(content["splits"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: no job of this ablation ({error}); name another --work") from None


def read_result(folder: Path) -> dict[str, Any] | None:
    """`result.json` of a cell; None if it has not finished.

    Raises:
        UserError: it cannot be read.
    """
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no result of this ablation ({error}); remove it, and the cell runs again") from None
    return found


def check_same(folder: Path, job: Job) -> None:
    """Refuse a cell that was begun by other sources, or with another recipe, data, weights or lengths.

    Raises:
        UserError: names the first difference.
    """
    path = folder / "job.json"
    if not path.is_file():
        return
    other = read_job(path)
    for name, value in job.identity.items():
        if other.identity.get(name) != value:
            raise UserError(
                f"--work: {folder} was made with other {name} ({other.identity.get(name)}, now {value}); name another "
                "--work, or remove it"
            )
    if (difference := _difference(other.facts(), job.facts())) is not None:
        key, before, now = difference
        raise UserError(
            f"--work: {folder} was made with another recipe: {key} {json.dumps(before)}, now {json.dumps(now)}; name "
            "another --work, or remove it"
        )


def _difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first dotted key that differs, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            found = _difference(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
            if found is not None:
                return found
        return None
    return None if before == now else (key, before, now)


def identity_of(data: Path, weights: Path | None) -> dict[str, str]:
    """Hashes (the first digits of sha256) of the package, of what measures, of the index of the data, of the weights.

    Raises:
        UserError: a file is not there.
    """
    found = code_now() | {"data": sha256(data / "index.json")[:DIGITS]}
    if weights is not None:
        if not weights.is_file():
            raise UserError(f"--weights: {weights} is no file")
        found["weights"] = sha256(weights)[:DIGITS]
    return found


def code_now() -> dict[str, str]:
    """What of an identity is code: the `sources` of the package, and the `measuring code` of this benchmark."""
    return {"sources": sources_hash(), "measuring code": measuring_hash()}


def check_code(job: Job) -> None:
    """Refuse a job that other code has planned: the files have changed while the grid ran.

    Raises:
        UserError: names what has changed.
    """
    for name, now in code_now().items():
        if job.identity.get(name) != now:
            raise UserError(
                f"the {name} changed since this grid began ({job.identity.get(name)}, now {now}); restore it, or "
                "name another --work. A grid is best run from a copy that nobody edits (git worktree)"
            )
