"""`maskmatch train | evaluate | report | export`. Large libraries are imported only when one of them runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskmatch_scale.errors import UserError
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


@app.command(epilog="Example: maskmatch evaluate runs/quickstart/segformer-maskmatch --split val evaluation.mode=whole")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
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
    """Evaluate a run's newest checkpoint, and keep figures and pictures for the report."""
    kinds = ("ema", "student") if weights == "both" else (weights,)
    if not set(kinds) <= {"ema", "student"}:
        raise UserError(f"--weights {weights}: it must be ema, student or both")
    from maskmatch_scale.runs.evaluate import evaluate_run, held_out_images

    total = held_out_images(run, split) * len(kinds) * (2 if locality else 1)
    with progress_of(f"{run.name} on {split}", total, unit="images", elsewhere="nothing") as advance:
        records = evaluate_run(run, split, kinds, advance, overrides or (), locality=locality)
    if as_json:
        print(json.dumps(records))  # noqa: T201
    else:
        Console().print(_iou_table(records))


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


@app.command(epilog="Example: maskmatch export runs/quickstart/segformer-maskmatch exports/scores-segformer")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, or one of its checkpoint folders.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write. It must be empty or not exist.")],
    weights: Annotated[str, typer.Option(help="ema (the teacher) or student.")] = "ema",
) -> None:
    """Export the newest checkpoint of a run as a folder that transformers or timm can load, with a model card."""
    if weights not in ("ema", "student"):
        raise UserError(f"--weights {weights}: it must be ema or student")
    from maskmatch_scale.export.write import export_run

    call = export_run(run, out, weights)
    console = Console()
    console.print(str(out), soft_wrap=True, highlight=False, markup=False)
    console.print(f"load it: {call}", soft_wrap=True, highlight=False, markup=False)


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
