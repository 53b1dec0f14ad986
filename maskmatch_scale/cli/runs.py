"""`maskmatch train | sweep | evaluate | report | export`. Large libraries are imported only when one of them runs."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskmatch_scale.errors import TrainingStopped, UserError
from maskmatch_scale.files import write_whole
from maskmatch_scale.progress import progress_of
from maskmatch_scale.training.signals import listen

app = typer.Typer()


@app.command(
    epilog="Example: maskmatch train configs/quickstart-segformer.yaml run.steps=20. On all GPUs of this machine: "
    "launch/deepspeed.sh configs/quickstart-segformer.yaml run.steps=20"
)
def train(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE", help="Recipe, a YAML file. configs/ has examples, docs/recipe.md all keys."),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe to change, for example run.steps=20."),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH",
            help="Continue a run. auto: from the newest checkpoint in run.dir, if any. PATH: from a run or checkpoint.",
        ),
    ] = None,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Train a recipe, in one process or as one rank under deepspeed, torchrun or accelerate."""
    from maskmatch_scale.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    listen(loaded.run.stop_signals)  # already now: the next import takes seconds
    from maskmatch_scale.train import train as run_training

    run_training(loaded, resume)


@app.command(
    epilog="Example: maskmatch sweep configs/quickstart-vit.yaml optim.lr=5e-4,1e-3,2e-3 method.mask.keep=0.3,0.5 "
    "run.steps=100 --out runs/lr --launcher launch/deepspeed.sh"
)
def sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe, a YAML file.")],
    overrides: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE,VALUE,…",
            help="Keys of the recipe. Values with commas between them are tried one after the other; of several such "
            "keys, every combination.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for a run directory of each run, and the report.")],
    resume: Annotated[
        str | None,
        typer.Option(metavar="auto", help="Go on with a sweep: finished runs are kept, others go on."),
    ] = None,
    launcher: Annotated[
        str,
        typer.Option(
            metavar="COMMAND",
            help="Starts each run on several ranks: launch/deepspeed.sh, or a launcher with its options, such as "
            "'torchrun --nproc-per-node 2'.",
        ),
    ] = "",
) -> None:
    """Train a recipe with different values, one run after the other, and compare the runs on the split dev."""
    if resume not in (None, "auto"):
        raise UserError(f"--resume {resume}: a sweep knows its runs by --out; write --resume auto")
    try:
        command = shlex.split(launcher)
    except ValueError as error:
        raise UserError(f"--launcher {launcher!r}: {error}") from None
    from maskmatch_scale.sweep import run as sweeping

    found = sweeping.run(recipe, overrides, out, resume=resume == "auto", launcher=command)
    console = Console()
    console.print(sweeping.table(found))
    best = found.best
    line = "no run has finished with a figure on dev" if best is None else f"{best.trial.name}, mIoU {best.miou:.4f}"
    console.print(f"best: {line}", soft_wrap=True, highlight=False, markup=False)
    if found.report is not None:
        console.print(f"report: {found.report}", soft_wrap=True, highlight=False, markup=False)
    if found.stopped is not None:
        raise TrainingStopped(*found.stopped)
    if failed := [row.trial.name for row in found.rows if row.failed]:
        raise TrainingStopped(f"{len(failed)} of {len(found.rows)} runs failed: {'; '.join(failed)}")


@app.command(epilog="Example: maskmatch evaluate runs/quickstart/segformer-maskmatch --split val evaluation.mode=whole")
def evaluate(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|CHECKPOINT", help="Run directory, or one of its checkpoints, such as RUN/checkpoints/best."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of `evaluation` to change, for example evaluation.mode=whole."),
    ] = None,
    split: Annotated[str, typer.Option(help="Labelled stream of data.root to evaluate on.")] = "val",
    weights: Annotated[str, typer.Option(help="ema (the teacher), student, or both.")] = "both",
    locality: Annotated[
        bool,
        typer.Option(
            "--locality",
            help="Also measure boundaries, small objects, masked units and the calibration of pseudo-labels. It takes "
            "several times as long.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Evaluate a run's newest checkpoint, or one that is named, and keep figures and pictures for the report."""
    kinds = ("ema", "student") if weights == "both" else (weights,)
    if not set(kinds) <= {"ema", "student"}:
        raise UserError(f"--weights {weights}: it must be ema, student or both")
    from maskmatch_scale.evaluation.scored import mean_warnings
    from maskmatch_scale.runs.evaluate import evaluate_run, held_out_images

    total = held_out_images(run, split) * len(kinds) * (2 if locality else 1)
    with progress_of(f"{run.name} on {split}", total, unit="images", elsewhere="nothing") as advance:
        records = evaluate_run(run, split, kinds, advance, overrides or (), locality=locality)
    if as_json:
        print(json.dumps(records))  # noqa: T201
    else:
        Console().print(_iou_table(records))
    for line in dict.fromkeys(line for record in records for line in mean_warnings(record)):
        print(f"warning: {line}", file=sys.stderr)  # noqa: T201


@app.command(
    epilog="Example: maskmatch report runs/quickstart/segformer-supervised runs/quickstart/segformer-maskmatch"
)
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories to compare.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="HTML file to write. Default: report.html in the run, or in the parent folder of several.",
        ),
    ] = None,
    rows: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the rows of the table to this file, as JSON."),
    ] = None,
) -> None:
    """Write a report on one or more runs as one HTML file, and print its table."""
    from maskmatch_scale.record.report import write_report
    from maskmatch_scale.record.summary import as_rows, summarise, summary_table

    path = write_report(runs, out)
    console = Console()
    summaries = [summarise(run) for run in runs]
    console.print(summary_table(summaries))
    if rows is not None:
        rows.parent.mkdir(parents=True, exist_ok=True)
        write_whole(rows, json.dumps(as_rows(summaries), indent=1))
    console.print(f"report: {path}", soft_wrap=True, highlight=False, markup=False)


@app.command(epilog="Example: maskmatch export runs/quickstart/segformer-maskmatch exports/scores-segformer --onnx")
def export(
    where: Annotated[
        Path, typer.Argument(metavar="RUN|EXPORT", help="Run directory, one of its checkpoint folders, or an export.")
    ],
    out: Annotated[
        Path | None,
        typer.Argument(metavar="[OUT]", help="Folder to write a run's model to. It must be empty or not exist."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of a run: ema (the teacher) or student.", show_default="ema")
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also write model.onnx, once it gives what torch gives.")
    ] = False,
    onnx_size: Annotated[
        tuple[int, int] | None,
        typer.Option(
            metavar="H W", help="Height and width of its images, px.", show_default="the window of evaluations"
        ),
    ] = None,
    onnx_images: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Image, or folder of images, to compare it with torch on; may be repeated.",
            show_default="held-out images of the run",
        ),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="REPO_ID", help="Also push it to the Hugging Face Hub: NAME or USER/NAME.")
    ] = None,
    private: Annotated[bool, typer.Option("--private/--public", help="Of a repository that is made for it.")] = True,
) -> None:
    """Export a run's newest checkpoint as a folder that transformers or timm can load, with a model card.

    With an EXPORT and no OUT: add to an export that exists.
    """
    if weights not in (None, "ema", "student"):
        raise UserError(f"--weights {weights}: it must be ema or student")
    if not onnx and (onnx_size or onnx_images):
        raise UserError("--onnx-size and --onnx-images belong to --onnx; add it, or leave them out")
    from maskmatch_scale.export.hand_on import hand_on

    console = Console()
    lines = hand_on(
        where,
        out,
        weights,
        onnx=onnx,
        onnx_size_px=onnx_size,
        onnx_images=onnx_images or (),
        push_to=push,
        private=private,
    )
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _iou_table(records: list[dict[str, Any]]) -> Table:
    first = records[0]
    table = Table(title=f"IoU on {first['split']}: {first['images']} images, step {first['step']}")
    table.add_column("class")
    for record in records:
        table.add_column(record["weights"], justify="right")
    for name in first["iou"]:
        values = [record["iou"][name] for record in records]
        table.add_row(Text(name), *("–" if value is None else f"{value:.3f}" for value in values))
    table.add_section()
    table.add_row("mIoU", *(f"{record['miou']:.4f}" for record in records))
    in_mean = (f"{record['classes_in_mean']} of {record['classes']}" for record in records)
    table.add_row("classes in the mean", *in_mean)
    table.add_row("pixel accuracy", *(f"{record['pixel_accuracy']:.4f}" for record in records))
    if "locality" in first:
        table.add_section()
        rows = [_locality_rows(record["locality"]) for record in records]
        for name in rows[0]:
            table.add_row(name, *("–" if row[name] is None else f"{row[name]:.3f}" for row in rows))
    return table


def _locality_rows(found: dict[str, Any]) -> dict[str, float | None]:
    """Figures of `measure_locality`, by the names of their rows."""
    labels = found["pseudo_labels"]
    threshold = "τ of its class" if isinstance(labels["threshold"], dict) else f"{labels['threshold']:g}"
    return {
        "boundary IoU": found["boundary_iou"],
        **{f"mIoU within {px} px of a boundary": value for px, value in found["miou_near_boundary"].items()},
        "recall of small objects": found["small_object_recall"],
        **{f"mIoU, {float(share):.0%} of units visible": value for share, value in found["miou_visible"].items()},
        "pseudo-labels: calibration error": labels["expected_error"],
        f"pseudo-labels: share with c ≥ {threshold}": labels["coverage"],
        "pseudo-labels: accuracy of these": labels["accuracy"],
    }
