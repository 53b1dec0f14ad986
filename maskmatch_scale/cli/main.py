"""The `maskmatch` command: its subcommands, and its exit codes."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from maskmatch_scale import __version__
from maskmatch_scale.cli import machine, plan, predict, runs, usage
from maskmatch_scale.cli.shards import shards_app
from maskmatch_scale.errors import (
    RESUMABLE,
    CommandFailed,
    StartInterrupted,
    TrainingStopped,
    UserError,
    is_of_lost_rank,
    is_of_this_rank,
)
from maskmatch_scale.files import disk_fault
from maskmatch_scale.progress import drop_output
from maskmatch_scale.redact import redacted
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
app.add_typer(predict.app)
app.add_typer(plan.app)
app.add_typer(machine.app)
app.add_typer(shards_app, name="shards")


@app.callback()
def maskmatch(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Semi-supervised segmentation with MaskMatch: write shards, plan, train, evaluate, predict, report, export."""


MISTAKE = 2
"""Exit code of a user's mistake."""

_BEGAN = time.time()
"""About when this process began."""


def main() -> None:
    """Run the command.

    A mistake of the user is one line on stderr, from the first rank of each machine, and exit code 2. So is a disk that
    is full or cannot be written to, if that is found before the first step of a run. A run that was stopped and can go
    on is one line too, and exit code 75. Where the environment names a file in `MASKMATCH_EXIT_CODE_FILE`, the code is
    also written there, because not every launcher passes it on.
    """
    logging.raiseExceptions = False  # a library's log that cannot be written is not worth a traceback a record
    try:
        code = _run_app()
    except usage.UsageError as error:
        _fail(usage.explain(error), MISTAKE, from_any_rank=False)
    except UserError as error:
        # Before a run starts, every rank finds the same mistake. Later a single rank may read a bad sample.
        alone = is_of_this_rank(error) or _run_has_started()
        _fail(str(error), MISTAKE, from_any_rank=alone and not error.on_all_ranks)
    except (CommandFailed, TrainingStopped, StartInterrupted) as error:
        resumable = error.exit_code == RESUMABLE
        message = f"{error}; go on with: {_again(sys.argv)}" if resumable else str(error)
        kind = "stopped" if resumable else "error"
        _fail(message, error.exit_code, from_any_rank=not error.on_all_ranks, kind=kind)
    except Exception as error:
        if fault := disk_fault(_naming_output(error)):
            _fail(fault, MISTAKE, from_any_rank=is_of_this_rank(error) or _run_has_started())
        # Tracebacks of many ranks would be mixed up. Each is in the log of its rank, if that was open already.
        log = getattr(error, "logged_in", None) if _has_other_ranks() else None
        if log is None:
            sys.stderr.write(redacted(traceback.format_exc()))
        if not _has_other_ranks():
            sys.exit(1)
        _fail(f"{_explained(error)}{f' (traceback: {log})' if log else ''}", 1, from_any_rank=True)
    else:
        sys.exit(code)
    finally:
        stop_listening()


def _run_app() -> int:
    """Run the command, and write out what it has printed: Python would do that later, and print a traceback.

    Returns:
        The exit code that the command asks for.
    """
    try:
        return app(standalone_mode=False) or 0
    finally:
        sys.stdout.flush()


def _naming_output(error: Exception) -> Exception:
    """An error of the disk that standard output goes to, with a name. Such errors have none, unlike those of files."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        try:
            os.write(sys.stdout.fileno(), b"\n")
        except OSError:
            drop_output()
            return OSError(error.errno, error.strerror, "standard output")
    return error


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
    """Print a message on one line, if there is one, and exit. Unless ``from_any_rank``, only the first rank of a
    machine prints it.
    """
    rank = os.environ.get("RANK", "0")
    # The ranks of a machine read the same files, so one message for each machine is enough.
    if message and (os.environ.get("LOCAL_RANK", rank) == "0" or from_any_rank):
        where = f"rank {rank}: " if rank != "0" or (from_any_rank and _has_other_ranks()) else ""
        print(f"maskmatch: {kind}: {where}{' '.join(redacted(message).split())}", file=sys.stderr, flush=True)  # noqa: T201
    file = os.environ.get("MASKMATCH_EXIT_CODE_FILE")
    if file:
        # The rank that ends first has the reason; but not one that was there before: elastic launchers start ranks
        # again.
        with suppress(OSError), Path(file).open("a") as known:
            if not known.tell() or os.fstat(known.fileno()).st_mtime < _BEGAN:
                known.truncate(0)
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
    if is_of_lost_rank(error):
        return f"another rank has died; its message or its log says why: {text}"
    return f"{type(error).__name__}: {text}"


def _run_has_started() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.distributed.is_initialized())


def _has_other_ranks() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
