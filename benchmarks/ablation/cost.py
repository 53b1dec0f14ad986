r"""What a step of each arm costs: CPU-seconds of one thread, and counted multiply–adds.

    python -m benchmarks.ablation.cost --task camvid --data SHARDS --weights VIT_S.pt --arms fixmatch maskmatch \
        --out benchmarks/results/ablation_cost_camvid.json

All arms are built in one process and take steps in turns, so a slow minute of the machine affects all alike. A step is
one after the burn-in, with the loading of its images. The arm `supervised`, whose step is that of a burn-in, is always
among them. `--cost` of `benchmarks.ablation` takes the file.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.ablation.arms import ARMS, Arm, arms_of
from benchmarks.ablation.equal_cost import BURN_IN_ARM
from benchmarks.ablation.tasks import TASKS, Setting, setting_of
from benchmarks.ablation.variants import callbacks_of, period_of
from benchmarks.harness import ROOT, check_out, describe_machine, markdown, say, time_interleaved, write_json
from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.engine import setup
from maskmatch_scale.errors import UserError
from maskmatch_scale.training import preflight
from maskmatch_scale.training.run import Run, build_run
from maskmatch_scale.training.step import take_step

COLUMNS = ("arm", "title", "cpu_s", "cpu_s_minimum", "gmacs", "over_fixmatch", "gmacs_over_fixmatch")


def build(setting: Setting, arm: Arm, steps: int, folder: Path) -> tuple[Run, Callable[[], object]]:
    """A run without burn-in, and a function that takes its next step (of a variant: steps of one period).

    Raises:
        UserError: the recipe cannot be run.
    """
    recipe = setting.recipe(arm, 0, setting.steps, folder)
    backbone = recipe.model.backbone.replace("transformers/configs/", f"transformers/{ROOT}/configs/")
    recipe = recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"backbone": backbone}),
            "method": recipe.method.model_copy(update={"burn_in": 0.0}),
            "data": recipe.data.model_copy(update={"workers": 0}),
            "run": recipe.run.model_copy(update={"steps": steps}),
        }
    )
    checked = preflight.check(recipe, None)
    with setup.environment_kept(checked.place):
        runtime = setup.start(checked.place, recipe.engine)
        preflight.count_class_pixels(runtime, recipe, checked.batches)
        run = build_run(checked, runtime)
    variant = [make(run) for make in callbacks_of(arm.variant, setting.steps)]
    batches, numbers = load_batches(run.batches, 0, steps), count()

    def take_steps() -> None:
        for number in islice(numbers, period_of(arm.variant)):
            for callback in variant:
                callback.before_step(number)
            take_step(run, number, batches)

    return run, take_steps


def measure(setting: Setting, arms: dict[str, Arm], repeats: int, folder: Path) -> list[dict[str, Any]]:
    """One row an arm."""
    runs: dict[str, Run] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, arm in arms.items():
        runs[name], steps[name] = build(setting, arm, (repeats + 1) * period_of(arm.variant), folder / name)
        say(f"built: {name}")
    timings = time_interleaved(steps, repeats, torch.device("cpu"))
    found: list[dict[str, Any]] = []
    for name, timing in timings.items():
        period = period_of(arms[name].variant)
        row = {"arm": name, "title": arms[name].title, "gmacs": runs[name].work.flops / 2e9}
        found.append(row | {"cpu_s": timing.median / period, "cpu_s_minimum": timing.minimum / period})
    fixmatch = next((row for row in found if row["arm"] == "fixmatch"), None)
    for row in found:
        for key, name in (("cpu_s", "over_fixmatch"), ("gmacs", "gmacs_over_fixmatch")):
            row[name] = row[key] / fixmatch[key] if fixmatch else None
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 2 for a mistake."""
    parser = argparse.ArgumentParser("python -m benchmarks.ablation.cost", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--task", choices=list(TASKS), required=True)
    add("--data", type=Path, required=True, help="shard folder of the task")
    add("--weights", type=Path, help="state dict that the backbone starts from; only tasks that need one")
    add("--arms", nargs="+", required=True, metavar="ARM", help=f"of {', '.join(ARMS)}")
    add("--labelled", type=int, metavar="N", help="labelled images; default: the task's own")
    add("--repeats", type=int, default=7, help="steps of each arm that are timed, after one that is not; default 7")
    add("--out", type=Path, required=True, help="JSON file; a Markdown table goes beside it")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings", help="keys of the recipe for every arm")
    options = parser.parse_args(arguments)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    try:
        check_out(options.out)
        if options.repeats < 1:
            raise UserError(f"--repeats: {options.repeats}; it must be above 0")
        setting = setting_of(options, steps=1000, device="cpu")
        arms = arms_of([BURN_IN_ARM, *options.arms])
        machine = describe_machine(torch.device("cpu"), ["maskmatch_scale", "benchmarks"])
        machine |= {"labelled": setting.labelled, "set": " ".join(options.settings) or "nothing"}
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(setting, arms, options.repeats, Path(folder))
    except ValueError as error:
        say(f"error: {error}")
        return 2
    write_json(options.out, machine, rows)
    title = f"Cost of a step: {TASKS[options.task].title}"
    options.out.with_suffix(".md").write_text(markdown(title, machine, rows, COLUMNS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
