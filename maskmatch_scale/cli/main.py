"""The `maskmatch` command. Nothing heavy is imported until a subcommand runs, so `--help` is instant."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from maskmatch_scale.cli.shards import shards_app
from maskmatch_scale.errors import TrainingStopped, UserError

app = typer.Typer(
    help="Semi-supervised segmentation with MaskMatch: train, evaluate, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(shards_app, name="shards")

MISTAKE = 2
"""Exit code of a user's mistake."""


def main() -> None:
    """Run the command; a user's mistake is one line on stderr (of a machine's first rank) and exit code 2."""
    try:
        app()
    except UserError as error:
        # Before the run every rank finds the same mistake; a bad sample later is met by one rank alone.
        _fail(str(error), MISTAKE, from_any_rank=_run_has_started() and not error.on_all_ranks)
    except TrainingStopped as error:
        _fail(str(error), 1, from_any_rank=False)
    except Exception as error:
        if not _has_other_ranks():
            raise
        # Tracebacks of many ranks bury each other; each stands in its rank's log, if there was one yet.
        log = getattr(error, "logged_in", None)
        if log is None:
            traceback.print_exc()
        _fail(f"{_explained(error)}{f' (traceback: {log})' if log else ''}", 1, from_any_rank=True)


def _fail(message: str, code: int, *, from_any_rank: bool) -> None:
    rank = os.environ.get("RANK", "0")
    # The ranks of a machine see the same files: its first one tells.
    if os.environ.get("LOCAL_RANK", rank) == "0" or from_any_rank:
        where = f"rank {rank}: " if rank != "0" or (from_any_rank and _has_other_ranks()) else ""
        print(f"maskmatch: error: {where}{' '.join(message.split())}", file=sys.stderr, flush=True)  # noqa: T201
    if _has_other_ranks():
        # An orderly exit leaves the process group, and waits for ranks that may never come.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _explained(error: Exception) -> str:
    """What an unexpected error means to who launched the job."""
    text = str(error)
    from_torch = isinstance(error, RuntimeError)
    if from_torch and ("imed out" in text or "imeout" in text):
        return (
            f"another rank did not come within the time limit of a collective (engine.collective_timeout_s); "
            f"its own message or its log says why: {text}"
        )
    if from_torch and ("Connection closed by peer" in text or "Connection reset by peer" in text):
        return f"another rank has died; its own message or its log says why: {text}"
    return f"{type(error).__name__}: {text}"


def _run_has_started() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.distributed.is_initialized())


def _has_other_ranks() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


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
    from maskmatch_scale.runs.model import evaluate_run, held_out_images

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


@app.command(epilog="Example: maskmatch doctor --backbone timm/vit_large_patch16_224 --image-size 768 --keep 0.3")
def doctor(
    backbone: Annotated[str | None, typer.Option(help="Look at this backbone instead of the machine.")] = None,
    image_size: Annotated[
        int | None, typer.Option(metavar="PX", help="Side of an image; default: 512, rounded to whole units.")
    ] = None,
    keep: Annotated[float, typer.Option(metavar="SHARE", help="Share of visible units.")] = 0.3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What this machine has; or whether a backbone is supported, and what masking can save it at most."""
    if backbone is None and image_size is not None:
        raise UserError(f"--image-size {image_size}: it needs --backbone")
    from maskmatch_scale.doctor import describe_machine, examine, explain

    found = describe_machine() if backbone is None else examine(backbone, image_size, keep)
    if as_json:
        print(json.dumps(found, ensure_ascii=False))  # noqa: T201
        return
    table = Table(title="this machine" if backbone is None else backbone, show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (found if backbone is None else explain(found)).items():
        table.add_row(name, value)
    Console().print(table)


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
