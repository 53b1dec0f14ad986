"""The Markdown page of a grid: how to read it, the tables, the arms, and the command that makes it again."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ablation.arms import ARMS
from benchmarks.ablation.equal_cost import spent_cpu_s
from benchmarks.ablation.gather import by_arm, draws_of, main_split, spread_in_burn_in
from benchmarks.ablation.job import EQUAL_COST, EQUAL_STEPS
from benchmarks.ablation.tasks import TASKS, Setting
from benchmarks.ablation.together import keys_beside_arm
from benchmarks.harness import machine_line, markdown_table
from benchmarks.paired import t_975

Cells = Sequence[dict[str, Any]]
"""From `read_cells`."""
SCORES = ("mIoU", "IoU", "accuracy", "coverage")
"""Ends of the names of columns that get three digits after the point."""


def title_of(cells: Cells) -> str:
    """Task, labels, length and number of draws."""
    labelled = labelled_of(cells)
    draws, some = len(draws_of(cells)), cells[0]["eval_images"]
    parts = [f"{labelled} labelled images"] if labelled else []
    parts += [f"{cells[0]['marks'][EQUAL_STEPS]} steps", f"{draws} draw{'s' if draws > 1 else ''}"]
    parts += [f"{some} images of each split"] if some else []
    parts += ["from trained runs"] if cells[0].get("start") else []
    return f"{TASKS[cells[0]['task']].title}: {', '.join(parts)}"


def labelled_of(cells: Cells) -> int | None:
    """Labelled images of a draw; None: all arms have all labels."""
    counts = [cell["recipe"]["data"]["labelled_count"] for cell in cells]
    return next((count for count in counts if count is not None), None)


def reference_of(cells: Cells) -> str | None:
    """The arm whose S steps are the cost of all; None: it is not among the cells, or no cost was given."""
    of_length = [cell["arm"] for cell in cells if cell["marks"].get(EQUAL_COST) == cell["marks"][EQUAL_STEPS]]
    return of_length[0] if of_length else None


def settings_of(cells: Cells) -> dict[str, Any]:
    """Keys of the recipe, by dotted key, in which all cells differ from the task's own recipe: what `--set` has set."""
    found: dict[str, Any] = {}
    for arm, (cell, *_) in by_arm(cells).items():
        if arm not in ARMS:
            continue
        task, steps = TASKS[cell["task"]], cell["marks"][EQUAL_STEPS]
        count = cell["recipe"]["data"]["labelled_count"] or task.labelled
        weights = Path("WEIGHTS") if task.needs_weights else None
        start = Path("START") if cell.get("start") else None
        setting = Setting(cell["task"], Path("SHARDS"), weights, count, steps, _device(cells), start=start)
        recipe = setting.recipe(ARMS[arm], cell["draw"], steps, Path("run"))
        plain = keys_beside_arm(arm, recipe.model_dump(mode="json"), recipe.burn_in_steps / steps)
        own = keys_beside_arm(arm, cell["recipe"], cell["burn_in_steps"] / steps)
        found |= {key: value for key, value in own.items() if key in plain and plain[key] != value}
    return found


def command(cells: Cells) -> str:
    """The command that makes the cells again, with placeholders for files."""
    first, task = cells[0], TASKS[cells[0]["task"]]
    weights = ["--weights", "WEIGHTS"] if task.needs_weights and not first.get("start") else []
    weights += ["--start", "START"] if first.get("start") else []
    words = ["--task", first["task"], "--data", "SHARDS", *weights]
    words += ["--arms", *by_arm(cells), "--draws", *draws_of(cells), "--steps", first["marks"][EQUAL_STEPS]]
    if (count := labelled_of(cells)) not in {None, task.labelled}:
        words += ["--labelled", count]
    if first["cost"]:
        words += ["--cost", "COSTS.json", "--reference", reference_of(cells) or "ARM"]
    words += ["--evaluate-every", first["evaluate_every"]]
    if tuple(first["splits"]) != task.splits:
        words += ["--splits", *first["splits"]]
    for option, key in (("--eval-images", "eval_images"), ("--curve-images", "curve_images")):
        if first[key] is not None:
            words += [option, first[key]]
    words += ["--device", _device(cells), "--jobs", first["machine"].get("jobs", 1)]
    if settings := settings_of(cells):
        words += ["--set", *(f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in settings.items())]
    words += ["--work", "FOLDER", "--out", "FILE.json"]
    line = " ".join(["python -m benchmarks.ablation", *(shlex.quote(str(word)) for word in words)])
    return " \\\n".join(_wrapped(line, width=116, subsequent_indent="    "))


def page(
    title: str,
    machine: Mapping[str, Any],
    cells: Cells,
    summary: Sequence[dict[str, Any]],
    differences: Sequence[dict[str, Any]],
) -> str:
    """The whole page.

    Args:
        title: its heading.
        machine: from `machines_of`.
        cells: from `read_cells`.
        summary: from `summary_rows`.
        differences: from `difference_rows`.
    """
    lines = [f"# {title}", "", "[How to read this](#how-to-read-this) · [arms](#arms)", ""]
    lines += [*_wrapped(machine_line(machine)), "", "```", command(cells), "```", ""]
    for mark in (EQUAL_STEPS, EQUAL_COST):
        at = [row for row in summary if row["at"] == mark]
        if at:
            lines += [f"## At {mark}", "", _scores(at, draws_of(cells), main_split(cells[0]))]
    if differences:
        lines += ["## Paired differences of mIoU, with their 95 % interval", ""]
        titles = {arm: own[0]["title"] for arm, own in by_arm(cells).items()}
        rows = [{**_signed(row), "arm": row["title"], "minus": titles[row["minus"]]} for row in differences]
        lines.append(markdown_table(rows, ("arm", "minus", "at", "split", "difference", "low", "high", "draws")))
    lines += ["## How to read this", ""]
    for point in _how_to_read(cells):
        lines += _wrapped(f"- {point}", subsequent_indent="  ")
    return "\n".join([*lines, "", "## Arms", "", _arms(cells)])


def _scores(rows: Sequence[dict[str, Any]], draws: Sequence[int], split: str) -> str:
    """One table: an arm a line; columns of which nothing is known are left out."""
    each = f"{split} mIoU of draw {' '.join(map(str, draws))}"
    shown = []
    for row in rows:
        values = " ".join("–" if value is None else f"{value:.3f}" for value in row["each draw"])
        fine = {name: f"{value:.3f}" if _is_score(name, value) else value for name, value in row.items()}
        known = {name: value for name, value in fine.items() if name not in {"arm", "title", "at"}}
        named = {(each if name == "each draw" else name): value for name, value in known.items()}
        shown.append({"arm": row["title"], **named, each: values})
    return markdown_table(shown, [name for name in shown[0] if any(row[name] is not None for row in shown)])


def _is_score(name: str, value: object) -> bool:
    return isinstance(value, float) and name.endswith(SCORES)


def _signed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row} | {name: f"{row[name]:+.4f}" for name in ("difference", "low", "high") if row[name] is not None}


def _arms(cells: Cells) -> str:
    """What each arm sets of the task's recipe."""
    rows = []
    for name, own in by_arm(cells).items():
        settings = ARMS[name].settings if name in ARMS else []
        rows.append({"name": name, "arm": own[0]["title"], "sets": " ".join(f"`{one}`" for one in settings) or None})
    return markdown_table(rows, ("arm", "name", "sets"))


def _how_to_read(cells: Cells) -> list[str]:
    """Points of the explanation, those of them that the grid needs."""
    first, draws, reference = cells[0], len(draws_of(cells)), reference_of(cells)
    steps = first["marks"][EQUAL_STEPS]
    splits = " and ".join(f"`{split}`" for split in first["splits"])
    points = [
        "**Arm**: one recipe. **Draw**: which training images keep their labels. The number of a draw is also the seed "
        "of the run, so the arms of a draw share labels, initial weights, and order and augmentation of images. "
        "Compare arms within a draw: scores may vary more from draw to draw than from arm to arm.",
        f"Scored is the **teacher**, {_inference(first['recipe'])}. Scores and differences are fractions, not per "
        f"cent, and means over draws; where no split is named, they are of `{main_split(first)}`."
        + (f" Choose on `dev` alone, never on {splits}." if splits else ""),
        f"**Equal steps**: {steps} optimizer steps. The learning rate stays constant after its warm-up, so that a "
        "longer run is, after so many steps, a run of this length.",
    ]
    if first.get("start"):
        points.append(
            f"**Start**: each draw starts from the teacher of a trained run with the same labels ({first['start']}; "
            "`--start`, kept by `--keep-checkpoints`), without a burn-in. So `supervised` is that run going on, with a "
            "new optimizer. Steps and cost are counted from there."
        )
    if first["cost"]:
        spent = spent_cpu_s(first, first["marks"][EQUAL_COST]) or 0.0
        of = f"as {steps} steps of {ARMS[reference].title} do" if reference in ARMS else "the same"
        points.append(
            f"**Equal cost**: as many steps as cost {of}, about {spent:.0f} CPU-seconds. What a step costs was "
            "measured beforehand, in fp32 on one CPU thread (`benchmarks.ablation.cost`), not during these runs: on "
            "another device or in another precision the ratios are others."
        )
    points += [
        "**Cost**: `GMACs/step` are counted multiply–adds (10⁹) of the backbones of student and teacher, forward and "
        "backward, in a step after the burn-in; `TMACs` (10¹²) those of the whole run, whose burn-in has the labelled "
        "loss alone." + (" `CPU-s` likewise. Evaluations are not counted." if first["cost"] else ""),
        f"**Pseudo-labels** of the teacher at the end, at the arm's own τ, on up to {first['pseudo_images']} training "
        "images that the draw left without labels (they are trained on, without labels): `coverage` is the share of "
        "pixels that are sure enough to count, `label accuracy` the share of right ones among these.",
        f"**Interval**: Student's t over {draws} paired draws. If it contains 0, these draws do not show which arm is "
        "better. It speaks of draws of labels, not of other data; one interval in twenty misses the truth by chance."
        + (f" With two draws it is {2 * t_975(1):.0f} standard errors wide and says little." if draws == 2 else ""),
    ]
    if (spread := spread_in_burn_in(cells)) is not None:
        points.append(
            f"**Rounding**: until step {spread.step} all arms train alike, and yet their mIoU on `dev` differs within "
            f"a draw, by {spread.mean:.4f} in the mean over draws and by up to {spread.most:.4f}: a GPU adds in "
            "another order each time, and training magnifies it. Single runs that differ by no more are not different."
        )
    if first["curve_images"] is not None:
        points.append(f"**Curves** (plot): `dev`, {first['curve_images']} images evenly spaced; tables have all.")
    return points


def _inference(recipe: Mapping[str, Any]) -> str:
    """How images are predicted, in words."""
    evaluation = recipe["evaluation"]
    if evaluation["mode"] != "sliding":
        return "on whole images"
    size = evaluation["window_px"] or recipe["data"]["crop_px"]
    return f"in sliding windows of {' × '.join(map(str, size))} px"


def _device(cells: Cells) -> str:
    return "cuda" if str(cells[0]["device"]).startswith("cuda") else "cpu"


def _wrapped(text: str, width: int = 120, subsequent_indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=subsequent_indent, break_long_words=False, break_on_hyphens=False
    )
