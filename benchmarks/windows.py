"""Whole images against windows of the training crop, with the position embedding on its own grid and cut to the crop.

A pretrained ViT-S/14 is fine-tuned on 8 labelled street scenes (CamVid, crops of 168 px, labelled loss alone), twice:
its position embedding as published (37 × 37 cells), and resized once to the crop's 12 × 12 cells, as the package did
before. Each is evaluated in windows and on whole images. One draw of labels and one seed.

    python -m benchmarks.windows --data SHARDS --weights VIT_S.pt --out benchmarks/results/windows.json

SHARDS is CamVid as `maskmatch shards write list` writes it, with the streams `labelled` and `val`, and without `dev`,
which would be evaluated in training; VIT_S.pt is a state dict of timm's vit_small_patch14_dinov2. Neither can be part
of the project.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import check_out, describe_machine, markdown, say, write_json
from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe import Recipe, parse_recipe
from maskmatch_scale.runs.evaluate import evaluate_run
from maskmatch_scale.train import train

COLUMNS = ("position_embedding", "predicted", "images", "miou", "pixel_accuracy")
CROP_PX = 168
GRIDS: dict[str, dict[str, Any]] = {"37 × 37, as published": {}, "12 × 12, the crop's": {"img_size": CROP_PX}}
MODES = {"windows of 168 px": "sliding", "whole images": "whole"}


def recipe_of(data: Path, weights: Path, options: dict[str, Any], steps: int, folder: Path) -> Recipe:
    """The recipe of one run."""
    return parse_recipe(
        {
            "data": {"root": str(data), "labelled_count": 8, "crop_px": CROP_PX, "workers": 1},
            "model": {
                "backbone": "timm/vit_small_patch14_dinov2",
                "head": "linear",
                "pretrained": str(weights),
                "backbone_options": options,
            },
            "method": {"base": "supervised", "mask": {"keep": None}, "scales": [1.0], "ema_decay": 0.99},
            "optim": {"lr": 2e-5, "head_lr_multiplier": 20.0, "warmup_steps": steps // 20},
            "engine": {"library": "accelerate", "zero_stage": 0, "precision": "fp32", "micro_batch": 4, "threads": 1},
            "evaluation": {"pictures": 0},
            "run": {
                "dir": str(folder),
                "steps": steps,
                "checkpoint_every": 0,
                "evaluate_every": 0,
                "log_every": 25,
            },
        }
    )


def measure(data: Path, weights: Path, steps: int, work: Path) -> Iterator[dict[str, Any]]:
    """Train both, evaluate each in both ways."""
    for number, (grid, options) in enumerate(GRIDS.items()):
        run = work / f"grid-{number}"
        train(recipe_of(data, weights, options, steps, run))
        for predicted, mode in MODES.items():
            (score,) = evaluate_run(run, "val", ("ema",), overrides=[f"evaluation.mode={mode}"])
            row = {"position_embedding": grid, "predicted": predicted}
            row |= {key: score[key] for key in ("miou", "pixel_accuracy", "inference", "images", "iou")}
            say(f"{grid}, {predicted}: mIoU {score['miou']:.4f}")
            yield row | {"steps": steps}


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, evaluate, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="shard folder of CamVid")
    parser.add_argument("--weights", type=Path, required=True, help="state dict of timm's vit_small_patch14_dinov2")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of each run")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; a Markdown table goes beside it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        check_out(options.out)
        machine = describe_machine(torch.device("cpu"), ["maskmatch_scale"])
        with tempfile.TemporaryDirectory() as work:
            rows = list(measure(options.data, options.weights.resolve(), options.steps, Path(work)))
    except (UserError, ValueError) as error:
        say(f"error: {error}")
        sys.exit(2)
    del machine["clock"]  # nothing is timed
    write_json(options.out, machine, rows)
    title = f"whole images and windows: ViT-S/14, 8 labelled images, {options.steps} steps, one seed"
    options.out.with_suffix(".md").write_text(markdown(title, machine, rows, COLUMNS), encoding="utf-8")


if __name__ == "__main__":
    main()
