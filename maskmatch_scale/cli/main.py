"""The `maskmatch` command: its subcommands, and its exit codes."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from maskmatch_scale import __version__
from maskmatch_scale.cli import machine, runs
from maskmatch_scale.cli.shards import shards_app
from maskmatch_scale.errors import RESUMABLE, TrainingStopped, UserError
from maskmatch_scale.training.signals import stop_listening


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"maskmatch_scale {__version__}")  # noqa: T201
        raise typer.Exit


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Example: maskmatch train configs/quickstart-segformer.yaml run.steps=20",
)
app.add_typer(runs.app)
app.add_typer(machine.app)
app.add_typer(shards_app, name="shards")


@app.callback()
def maskmatch(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Semi-supervised segmentation with MaskMatch: write shards, train, evaluate, report, export."""


MISTAKE = 2
"""Exit code of a user's mistake."""


def main() -> None:
    """Run the command.

    A mistake of the user is one line on stderr, from the first rank of each machine, and exit code 2. A run that was
    stopped and can go on is one line too, and exit code 75. Where the environment names a file in
    `MASKMATCH_EXIT_CODE_FILE`, the code is also written there, because not every launcher passes it on.
    """
    try:
        app()
    except UserError as error:
        # Before a run starts, every rank finds the same mistake. Later a single rank may read a bad sample.
        _fail(str(error), MISTAKE, from_any_rank=_run_has_started() and not error.on_all_ranks)
    except TrainingStopped as error:
        resumable = error.exit_code == RESUMABLE
        message = f"{error}; go on with: {_again(sys.argv)}" if resumable else str(error)
        kind = "stopped" if resumable else "error"
        _fail(message, error.exit_code, from_any_rank=not error.on_all_ranks, kind=kind)
    except Exception as error:
        if not _has_other_ranks():
            raise
        # Tracebacks of many ranks would be mixed up. Each is in the log of its rank, if that was open already.
        log = getattr(error, "logged_in", None)
        if log is None:
            traceback.print_exc()
        _fail(f"{_explained(error)}{f' (traceback: {log})' if log else ''}", 1, from_any_rank=True)
    finally:
        stop_listening()


def _again(arguments: Sequence[str]) -> str:
    """The command that continues a run that was started by these arguments."""
    words = ["maskmatch"]
    rest = iter(arguments[1:])
    for word in rest:
        if word == "--resume":
            next(rest, None)
        elif not word.startswith(("--resume=", "--local_rank=", "--local-rank=")):
            words.append(word)
    command = shlex.join([*words, "--resume", "auto"])
    return f"{command} (under the same launcher)" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else command


def _fail(message: str, code: int, *, from_any_rank: bool, kind: str = "error") -> None:
    """Print a message on one line and exit. Unless ``from_any_rank``, only the first rank of a machine prints it."""
    rank = os.environ.get("RANK", "0")
    # The ranks of a machine read the same files, so one message for each machine is enough.
    if os.environ.get("LOCAL_RANK", rank) == "0" or from_any_rank:
        where = f"rank {rank}: " if rank != "0" or (from_any_rank and _has_other_ranks()) else ""
        print(f"maskmatch: {kind}: {where}{' '.join(message.split())}", file=sys.stderr, flush=True)  # noqa: T201
    file = os.environ.get("MASKMATCH_EXIT_CODE_FILE")
    if file:
        with suppress(OSError), Path(file).open("a") as known:
            if not known.tell():  # the rank that ends first has the reason
                known.write(f"{code}\n")
    if _has_other_ranks():
        # A normal exit would leave the process group, and wait for ranks that may have ended.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _explained(error: Exception) -> str:
    """The message for an unexpected error. Errors of collectives are explained, because they come from another rank."""
    text = str(error)
    from_torch = isinstance(error, RuntimeError)
    if from_torch and ("imed out" in text or "imeout" in text):
        return (
            "another rank did not join a collective within the time limit (engine.collective_timeout_s); "
            f"its message or its log says why: {text}"
        )
    if from_torch and ("Connection closed by peer" in text or "Connection reset by peer" in text):
        return f"another rank has died; its message or its log says why: {text}"
    return f"{type(error).__name__}: {text}"


def _run_has_started() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.distributed.is_initialized())


def _has_other_ranks() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
