r"""Step times that a plan predicts, against those that were measured: results of `train_step`, on a CPU and on an H100.

On the CPU by a measurement of its operators, on the GPU by its data sheet and the shares of `planning/efficiency.py`.
Of these the seconds of a launch were taken from the same results, so the parts of the step on the GPU show how well one
figure fits all of them, and only the step with CUDA graphs is a prediction.

    maskmatch plan configs/one-view.yaml --measure benchmarks/results/machine_cpu.json
    python -m benchmarks.planned_time --measured benchmarks/results/machine_cpu.json \
        --out benchmarks/results/planned_time.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT, check_out, describe_machine, markdown, say, write_json
from maskmatch_scale.planning.build import build
from maskmatch_scale.planning.hardware import cluster_of, gpu_named
from maskmatch_scale.planning.measured import read_measurement
from maskmatch_scale.planning.setting import Gpu
from maskmatch_scale.planning.step_time import StepTime, step_time
from maskmatch_scale.recipe import parse_recipe

COLUMNS = ("device", "backbone", "precision", "images", "part", "predicted_s", "measured_s", "error")
PARTS = {
    "teacher": "teacher, three scales",
    "labelled view": "labelled view",
    "strong views": "strong view",
    "masked view": "masked view",
}
"""Names of a plan, and those of the result."""
GOAL = 0.2
GRAPHED = "ours, CUDA graphs"


def rows_of(file: Path, gpu: Gpu, device: str) -> Iterator[dict[str, Any]]:
    """One row a part, and one for the whole step."""
    content = json.loads(file.read_text(encoding="utf-8"))
    for row in content["rows"]:
        if row["step"] not in ("ours", GRAPHED):
            continue
        graphed = row["step"] == GRAPHED
        say(f"{device}: {row['backbone']}{', CUDA graphs' if graphed else ''}")
        found = planned(row, gpu, graphed=graphed)
        base = {"device": device, **{name: row[name] for name in ("backbone", "image_size", "precision", "images")}}
        if not graphed:
            measured = {
                part["part"]: part["seconds_min"]
                for part in content["parts"]
                if part["step"] == "ours" and part["backbone"] == row["backbone"]
            }
            for part in found.parts:
                if part.name in PARTS:
                    yield base | _compared(part.name, part.seconds, measured[PARTS[part.name]])
        # `train_step` makes its views beforehand.
        whole = found.seconds - sum(part.seconds for part in found.parts if part.name == "views drawn")
        yield base | _compared("step, CUDA graphs" if graphed else "step", whole, row["seconds_min"])


def _compared(part: str, predicted: float, measured: float) -> dict[str, Any]:
    return {"part": part, "predicted_s": predicted, "measured_s": measured, "error": predicted / measured - 1}


def planned(row: dict[str, Any], gpu: Gpu, *, graphed: bool) -> StepTime:
    """The step that `train_step` takes: FixMatch, a masked view, three scales, one rank, no DeepSpeed."""
    content = {
        "data": {"root": "none", "crop_px": row["image_size"]},
        "model": {"backbone": row["backbone"], "num_classes": row["classes"]},
        "method": {"mask": {"keep": row["keep"]}, "scales": [0.5, 1.0, 1.5]},
        "engine": {
            "library": "accelerate",
            "zero_stage": 0,
            "precision": row["precision"],
            "micro_batch": row["images"],
            "cuda_graphs": graphed,
        },
        "run": {"dir": "none", "steps": 1},
    }
    return step_time(build(parse_recipe(content), gpu).subject, cluster_of(1, gpu))


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; a Markdown table goes beside it")
    parser.add_argument(
        "--measured", type=Path, required=True, help="measurement of the CPU that train_step.json is of"
    )
    options = parser.parse_args(arguments)
    results = ROOT / "benchmarks/results"
    rows: list[dict[str, Any]] = []
    try:
        check_out(options.out)
        for file in sorted((results / "gpu").glob("train_step-*.json")):
            rows += rows_of(file, gpu_named("h100"), "H100")
        rows += rows_of(results / "train_step.json", read_measurement(options.measured), "CPU, 1 thread")
    except ValueError as error:
        say(f"error: {error}")
        return 2
    machine = describe_machine(torch.device("cpu"), ["maskmatch_scale", "benchmarks/planned_time.py"])
    machine |= {"measured by": options.measured.name, "goal": GOAL}
    within = sum(abs(row["error"]) <= GOAL for row in rows)
    targets = [{"rows": len(rows), "within_the_goal": within, "largest_error": max(abs(row["error"]) for row in rows)}]
    write_json(options.out, machine, rows, targets=targets)
    text = markdown("planned_time: predicted and measured steps", machine, rows, COLUMNS)
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
