r"""Runs a grid of arms × draws of labels, and writes JSON, Markdown and a plot.

    python -m benchmarks.ablation --task camvid --data SHARDS --weights VIT_S.pt --arms supervised fixmatch maskmatch \
        --draws 0 1 2 3 4 --steps 1500 --jobs 2 --device cpu --work FOLDER --out benchmarks/results/ablation_camvid.json

Each cell of the grid is a process with one thread. What has finished is kept in --work: the same command goes on after
a stop or a kill. All arms of the first draw come first, so that a time limit leaves whole pairs.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablation.arms import ARMS, arms_of
from benchmarks.ablation.equal_cost import BURN_IN_ARM, Costs, read_costs, run_cost, steps_for
from benchmarks.ablation.job import EQUAL_COST, EQUAL_STEPS, Job, check_same, identity_of
from benchmarks.ablation.pool import Cell, run_cells
from benchmarks.ablation.report import write_report
from benchmarks.ablation.start import Start, start_of
from benchmarks.ablation.tasks import TASKS, Setting, setting_of
from benchmarks.ablation.variants import identity_of_variant
from benchmarks.harness import check_out, describe_machine, say
from maskmatch_scale.errors import UserError

PSEUDO_IMAGES = 40
"""At most so many images, on which pseudo-labels are checked."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line; prints the reason and exits with 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", choices=list(TASKS), required=True)
    add("--data", type=Path, required=True, help="shard folder of the task")
    add("--weights", type=Path, help="state dict that the backbone starts from; only tasks that need one")
    add("--arms", nargs="+", required=True, metavar="ARM", help=f"of {', '.join(ARMS)}")
    add("--draws", type=int, nargs="+", default=[0, 1, 2, 3, 4], metavar="N", help="default 0 1 2 3 4")
    add("--labelled", type=int, metavar="N", help="labelled images of a draw; default: the task's own")
    add("--steps", type=int, required=True, metavar="S", help="optimizer steps of every arm, at least")
    add("--cost", type=Path, help="JSON of CPU-seconds a step, from benchmarks.ablation.cost; cheaper arms run longer")
    add("--reference", default="maskmatch", metavar="ARM", help="arm whose S steps are equal cost; default maskmatch")
    add("--jobs", type=int, default=1, help="cells at a time; default 1")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--work", type=Path, required=True, help="folder of the cells")
    add("--start", type=Path, metavar="FOLDER", help="every draw starts from the teacher of FOLDER/draw-N/run")
    add("--keep-checkpoints", action="store_true", help="of finished cells, so that another grid can start from them")
    add("--out", type=Path, required=True, help="JSON file; a Markdown table and a plot go beside it")
    add("--minutes", type=float, help="time limit: what has not finished by then is left out, and can go on later")
    add("--evaluate-every", type=int, metavar="E", help="steps between points of the curve; default S / 10")
    add("--checkpoint-every", type=int, metavar="C", help="default E; 0: none, a cell that was stopped starts again")
    add("--splits", nargs="*", metavar="STREAM", help="evaluated at the marks besides dev; default: the task's own")
    add("--eval-images", type=int, metavar="N", help="images of each split; default all")
    add("--curve-images", type=int, metavar="N", help="images of dev for points of the curve; default --eval-images")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings", help="keys of the recipe for every arm")
    return parser.parse_args(arguments)


def check_numbers(options: argparse.Namespace) -> None:
    """Refuse numbers that must be above 0 and are not.

    Raises:
        UserError: names the option.
    """
    for name in ("steps", "jobs", "evaluate_every", "eval_images", "curve_images", "minutes"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')}: {value}; it must be above 0")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: there is no GPU here; use --device cpu")


def plan(options: argparse.Namespace) -> list[Cell]:
    """All cells, the arms of the first draw first, their jobs written.

    Raises:
        ValueError: an option is wrong, or a cell was made by other sources or with another recipe. Nothing is written.
    """
    check_numbers(options)
    arms = arms_of(options.arms)
    arms_of([options.reference], "--reference")
    splits = splits_of(options)
    setting = setting_of(options, options.steps, options.device, splits, options.start)
    work: Path = options.work.resolve()
    costs = read_costs(options.cost) if options.cost else None
    budget = budget_of(setting, costs, options.reference, work) if costs else None
    identity = identity_of(setting.data, setting.weights)
    starts = {draw: start_of(setting.start, draw, setting.labelled) for draw in options.draws} if setting.start else {}
    machine = machine_of(options, identity["sources"])
    every = options.evaluate_every or max(1, options.steps // 10)
    cells = []
    for draw in dict.fromkeys(options.draws):
        for name, arm in arms.items():
            folder = work / name / f"draw-{draw}"
            burn_in = setting.recipe(arm, draw, options.steps, folder).burn_in_steps
            cost, marks = None, {EQUAL_STEPS: options.steps}
            if costs is not None and budget is not None:
                cost = {"cpu_s": costs.of(name), "burn_in_cpu_s": costs.of(BURN_IN_ARM), "gmacs": costs.gmacs[name]}
                marks[EQUAL_COST] = steps_for(budget, cost["cpu_s"], cost["burn_in_cpu_s"], burn_in)
            length = max(marks.values())
            checkpoints = every if options.checkpoint_every is None else options.checkpoint_every
            recipe = setting.recipe(arm, draw, length, folder / "run", checkpoint_every=checkpoints)
            job = Job(
                task=options.task,
                arm=name,
                title=arm.title,
                group=arm.group,
                draw=draw,
                recipe=recipe.model_dump(mode="json"),
                marks=marks,
                evaluate_every=every,
                splits=splits,
                eval_images=options.eval_images,
                curve_images=options.curve_images or options.eval_images,
                pseudo_images=PSEUDO_IMAGES,
                cost=cost,
                identity=identity | identity_of_variant(arm.variant) | _identity_of_start(starts.get(draw)),
                machine=machine,
                variant=arm.variant,
                start=starts[draw].title if draw in starts else None,
                keep_checkpoints=options.keep_checkpoints,
            )
            step_cost = cost or {"cpu_s": 1.0, "burn_in_cpu_s": 0.5}
            weight = run_cost(step_cost["cpu_s"], step_cost["burn_in_cpu_s"], burn_in, length)
            cells.append(Cell(job, folder, weight))
    for cell in cells:
        check_same(cell.folder, cell.job)
    for cell in cells:
        if not (cell.folder / "result.json").is_file():
            cell.job.write(cell.folder)
    return cells


def _identity_of_start(start: Start | None) -> dict[str, str]:
    return {"start": start.digest} if start else {}


def splits_of(options: argparse.Namespace) -> tuple[str, ...]:
    """Streams that are evaluated at the marks besides `dev`, each once."""
    splits = TASKS[options.task].splits if options.splits is None else options.splits
    return tuple(split for split in dict.fromkeys(splits) if split != "dev")


def budget_of(setting: Setting, costs: Costs, reference: str, work: Path) -> float:
    """CPU-seconds of S steps of the reference arm.

    Raises:
        UserError: its cost was not measured.
    """
    burn_in = setting.recipe(ARMS[reference], 0, setting.steps, work).burn_in_steps
    return run_cost(costs.of(reference), costs.of(BURN_IN_ARM), burn_in, setting.steps)


def machine_of(options: argparse.Namespace, sources: str) -> dict[str, Any]:
    """The machine; the code by its hash alone, from which the report finds the commit."""
    machine = describe_machine(torch.device(options.device), [])
    for name in ("clock", "load_at_start", "commit", "sources"):
        del machine[name]
    return machine | {"threads": 1, "jobs": options.jobs, "sources_sha256": sources}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid; 0, 1 if a cell failed, 2 for a mistake, 130 or 143 if it was interrupted."""
    options = parse(arguments)
    try:
        check_out(options.out)
        cells = plan(options)
    except ValueError as error:
        say(f"error: {error}")
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run_cells(cells, options.jobs, options.device, options.minutes)
    except KeyboardInterrupt as interrupt:
        say("interrupted: the cells that ran have ended; the same command goes on")
        return int(interrupt.args[0]) if interrupt.args else 130
    for status in ("failed", "left out"):
        for cell in cells:
            if cell.status == status:
                say(f"{status}: {cell.name}{f': {cell.reason}' if cell.reason else ''}")
    finished = [cell.folder for cell in cells if cell.status == "done"]
    if finished:
        try:
            write_report(finished, options.out)
        except ValueError as error:
            say(f"error: {error}")
            return 2
        say(f"written: {options.out}, .md and .png, of {len(finished)} of {len(cells)} cells")
    return int(any(cell.status == "failed" for cell in cells))


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(128 + number)


if __name__ == "__main__":
    sys.exit(main())
