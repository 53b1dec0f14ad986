"""What the recipes of `configs/` will need, by the planner: memory of a GPU, seconds of a step, GPU-hours.

`python -m benchmarks.planned_recipes --out FILE.json` plans every recipe and every other size that its head names, on
GPUs of a data sheet. With `--heads` the figures are written into the heads, from the file: nothing is planned then.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT, check_out, describe_machine, machine_line, markdown_table, say, write_json
from maskmatch_scale.planning.build import build
from maskmatch_scale.planning.hardware import cluster_of, gpu_named
from maskmatch_scale.planning.memory import step_peak
from maskmatch_scale.planning.step_time import step_time
from maskmatch_scale.recipe import load_recipe

GPU = "h100"
SOURCES = ("benchmarks/planned_recipes.py", "configs", "maskmatch_scale/planning")
RESULTS = ROOT / "benchmarks" / "results" / "planned_recipes.json"
TITLE = "# Planned for {gpus} H100 of 80 GB (benchmarks/results/planned_recipes.md), without evaluations:"
COLUMNS = ("recipe", "size", "gpus", "memory_gb", "step_s", "steps", "gpu_hours", "limit")


@dataclass(frozen=True)
class Data:
    """A data set at the split that the recipe names."""

    classes: int
    unlabelled: int
    """Images of the training set that the split does not label."""
    gpus: int = 4


DATA = {
    "pascal": Data(21, 10_582 - 92),
    "cityscapes": Data(19, 2_975 - 186),
    "ade20k": Data(150, 20_210 - 316),
    "coco": Data(81, 118_287 - 232),
    "pretraining": Data(150, 10_000_000, gpus=64),
}
SIZES = {"vit": ("B", "S", "L", "DINOv3"), "segformer": ("b5", "b2")}
"""The recipe's own first; the others by the names of the heads."""


def head_of(path: Path) -> str:
    """The comment above the first key, with lines that a backslash divides joined again."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return re.sub(r" \\\n *", " ", "\n".join(lines))


def variants(path: Path) -> dict[str, list[str]]:
    """Overrides in a head, by the name before them: other sizes, and the baselines."""
    found = {}
    for line in head_of(path).splitlines():
        if divided := re.fullmatch(r"(\S.*?)  +([a-z_]+\.[a-z_.]+=.*)", line.strip()):
            found[divided[1]] = divided[2].split()
    return found


def recipes() -> list[Path]:
    """Those that are planned."""
    return sorted((ROOT / "configs").glob("*/*.yaml"))


def plan(path: Path) -> list[dict[str, Any]]:
    """A row for each size of a recipe."""
    data, gpu, others = DATA[path.parent.name], gpu_named(GPU), variants(path)
    rows = []
    for size in SIZES[path.stem]:
        if size not in others and size != SIZES[path.stem][0]:
            continue
        recipe = load_recipe(path, others.get(size, []))
        subject = build(recipe, gpu, data.classes).subject
        step = step_time(subject, cluster_of(data.gpus, gpu))
        images = data.gpus * subject.unlabelled_images * recipe.engine.accumulation
        steps = recipe.run.steps or -(-round(data.unlabelled * (recipe.run.epochs or 0)) // images)
        share = step.share_of()
        rows.append(
            {
                "recipe": str(path.relative_to(ROOT)),
                "size": size,
                "gpus": data.gpus,
                "memory_gb": step_peak(subject, data.gpus) / 1e9,
                "step_s": step.seconds,
                "steps": steps,
                "gpu_hours": step.seconds * steps * data.gpus / 3600,
                "limit": max(share, key=lambda name: share[name]),
            }
        )
        say(f"planned_recipes: {rows[-1]['recipe']} {size}: {step.seconds:.3f} s a step")
    return rows


def head_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the head of a recipe says of its rows."""
    lines = [TITLE.format(gpus=rows[0]["gpus"])]
    for row in rows:
        size, memory, step_s, hours = row["size"], row["memory_gb"], row["step_s"], row["gpu_hours"]
        lines.append(f"#   {size:9}{memory:5.1f} GB a GPU   {step_s:6.3f} s a step   {hours:7,.1f} GPU-hours")
    return lines


def with_planned(text: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of a recipe with `head_lines` in place of those that are there, or before what is published."""
    start = TITLE.split("{", 1)[0]
    kept: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.startswith(start):
            inside = True
        elif inside and not line.startswith("#   "):
            inside = False
            if line == "#":
                continue
        if not inside:
            kept.append(line)
    at = next(number for number, line in enumerate(kept) if line.startswith("# Published"))
    return "\n".join([*kept[:at], *head_lines(rows), "#", *kept[at:]]) + "\n"


def page(machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    return "\n".join(
        [
            "# Recipes, planned",
            "",
            machine_line(machine),
            "",
            "Predicted by `maskmatch_scale/planning` from data sheets and named efficiencies; no recipe was run at "
            "full length, and evaluations are not counted. Lengths are those of the split that the recipe names; the "
            "pre-training reads 10 million images once.",
            "",
            markdown_table(rows, COLUMNS),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan and write JSON and Markdown; or write the heads."""
    parser = argparse.ArgumentParser("python -m benchmarks.planned_recipes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE.json", help="default %(default)s")
    parser.add_argument("--heads", action="store_true", help="write the figures of --out into the heads of the recipes")
    parser.add_argument(
        "--recipes", nargs="+", metavar="FILE.yaml", help="plan these alone; keep the rows of the others"
    )
    options = parser.parse_args(arguments)
    if options.heads:
        rows = json.loads(options.out.read_text(encoding="utf-8"))["rows"]
        for path in recipes():
            own = [row for row in rows if row["recipe"] == str(path.relative_to(ROOT))]
            path.write_text(with_planned(path.read_text(encoding="utf-8"), own), encoding="utf-8")
        return 0
    try:
        check_out(options.out)
    except ValueError as error:
        say(f"planned_recipes: {error}")
        return 2
    begin = time.perf_counter()
    machine = describe_machine(torch.device("cpu"), SOURCES)
    chosen = [Path(name).resolve() for name in options.recipes or recipes()]
    kept = (
        json.loads(options.out.read_text(encoding="utf-8"))["rows"] if options.recipes and options.out.is_file() else []
    )
    planned = {path: plan(path) for path in chosen}
    rows = []
    for path in recipes():
        name = str(path.relative_to(ROOT))
        rows += planned.get(path, [row for row in kept if row["recipe"] == name])
    machine |= {"seconds": round(time.perf_counter() - begin)}
    write_json(options.out, machine, rows)
    options.out.with_suffix(".md").write_text(page(machine, rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
