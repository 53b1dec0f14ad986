"""`maskmatch train | evaluate | report | export`: runs. Nothing heavy is imported until one of them is called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from maskmatch_scale.errors import UserError

app = typer.Typer()


@app.command(
    epilog="Example: deepspeed --num_accelerators 2 --no_local_rank --module maskmatch_scale train "
    "configs/quickstart-segformer.yaml run.steps=20"
)
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML); configs/ has commented ones.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="e.g. run.steps=20")] = None,
    resume: Annotated[str | None, typer.Option(help="auto, or a run or checkpoint folder to continue from.")] = None,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Train a recipe: alone, or as one rank of deepspeed or torchrun."""
    from maskmatch_scale.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    from maskmatch_scale.train import train as run_training

    run_training(loaded, resume)


@app.command(epilog="Example: maskmatch evaluate runs/quickstart/segformer-maskmatch --split val")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    split: Annotated[str, typer.Option(help="Stream of the shard folder to evaluate on.")] = "val",
    weights: Annotated[str, typer.Option(help="ema, student or both.")] = "both",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Per-class IoU of a run's newest checkpoint; figures and pictures are kept for the report."""
    kinds = ("ema", "student") if weights == "both" else (weights,)
    if not set(kinds) <= {"ema", "student"}:
        raise UserError(f"--weights {weights}: it must be ema, student or both")
    from maskmatch_scale.runs.evaluate import evaluate_run, held_out_images

    console = Console(stderr=as_json)
    total = held_out_images(run, split) * len(kinds)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"{run.name} on {split}", total=total)
        records = evaluate_run(run, split, kinds, lambda: progress.advance(task))
    if as_json:
        print(json.dumps(records))  # noqa: T201
    else:
        console.print(_iou_table(records))


@app.command(
    epilog="Example: maskmatch report runs/quickstart/segformer-supervised runs/quickstart/segformer-maskmatch"
)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    out: Annotated[Path | None, typer.Option(help="Where to; default: beside the runs.")] = None,
    rows: Annotated[Path | None, typer.Option("--json", help="Write the table's rows there, too.")] = None,
) -> None:
    """One self-contained HTML report over runs, and the same table here."""
    from maskmatch_scale.record.report import write_report
    from maskmatch_scale.record.summary import as_rows, summarise, summary_table

    path = write_report(runs, out)
    console = Console()
    summaries = [summarise(run) for run in runs]
    console.print(summary_table(summaries))
    if rows is not None:
        rows.write_text(json.dumps(as_rows(summaries), indent=1))
    console.print(f"report: {path}", soft_wrap=True, highlight=False)


@app.command(epilog="Example: maskmatch export runs/quickstart/segformer-maskmatch exports/scores-segformer")
def export(
    run: Annotated[Path, typer.Argument(help="Run directory, or a checkpoint folder of one.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist, or be empty.")],
    weights: Annotated[str, typer.Option(help="ema or student.")] = "ema",
) -> None:
    """The newest checkpoint as a folder that transformers or timm loads, with a model card."""
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
        table.add_row(name, *("–" if value is None else f"{value:.3f}" for value in values))
    table.add_section()
    table.add_row("mIoU", *(f"{record['miou']:.4f}" for record in records))
    table.add_row("pixel accuracy", *(f"{record['pixel_accuracy']:.4f}" for record in records))
    return table
