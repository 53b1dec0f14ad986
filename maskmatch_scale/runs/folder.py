"""Makes a run directory, after moving an older run aside, locks it, and keeps the log of each rank in it.

Decision: docs/decisions/0027-older-run-moved-aside.md.
Decision: docs/decisions/0034-file-names-of-a-run-in-record.md.
Decision: docs/decisions/0047-lock-of-a-run-folder.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.errors import RESUMABLE, StartInterrupted, TrainingStopped, UserError
from maskmatch_scale.files import disk_fault, write_whole
from maskmatch_scale.progress import show
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.redact import has_secret
from maskmatch_scale.runs.data import RunData
from maskmatch_scale.runs.lock import FolderLock
from maskmatch_scale.runs.log_file import LogFile

log = logging.getLogger("maskmatch_scale")


@contextmanager
def open_folder(
    folder: RunFolder, recipe: Recipe, data: RunData, runtime: Runtime, *, continued: bool
) -> Iterator[None]:
    """Make the run directory, keep others from it while the body runs, and write recipe and data description into it.

    All ranks call it together; rank 0 does it. Another run that is there is renamed to `NAME.previous-1` (2, 3, …).

    Args:
        folder: the paths of the run directory.
        recipe: of the run.
        data: what it is trained on.
        runtime: this rank.
        continued: whether this run continues the one that is there.

    Raises:
        UserError: on all ranks: another live run has the folder, or it cannot be made or written to. Then the older run
            is where it was, and no new one is there; if another has come in between, the message says where it is.
    """
    lock, refusal = None, ""
    if runtime.rank == 0:
        try:
            lock = FolderLock(folder)
        except UserError as error:
            refusal = str(error)
    try:
        if lock is not None:
            try:
                _fill(folder, recipe, data, lock, continued=continued)
            except UserError as error:
                refusal = str(error)
            except OSError as error:
                refusal = disk_fault(error) or str(error)
        refusal = runtime.text_of(0, refusal)  # which lets the others wait until the folder is there
        if refusal:
            refused = UserError(refusal)
            refused.on_all_ranks = True
            raise refused
        yield
    finally:
        if lock is not None:
            lock.release()


def _fill(folder: RunFolder, recipe: Recipe, data: RunData, lock: FolderLock, *, continued: bool) -> None:
    run = folder.path
    if lock.dead is not None:
        show(f"{run} was locked by a run that has died ({lock.dead}): taken over")
    aside = None
    if not continued and folder.recipe.exists():
        number = next(n for n in range(1, 10_000) if not run.with_name(f"{run.name}.previous-{n}").exists())
        aside = run.with_name(f"{run.name}.previous-{number}")
        lock.move_aside(aside)
    try:
        _describe(folder, recipe, data)
    except OSError:
        if not continued:
            with suppress(OSError):
                folder.data.unlink(missing_ok=True)
                folder.deepspeed.unlink(missing_ok=True)
                lock.release()
                run.rmdir()
                if aside is not None:
                    aside.rename(run)
        raise
    if aside is not None:
        show(f"{run} held an older run: moved to {aside}")


def _describe(folder: RunFolder, recipe: Recipe, data: RunData) -> None:
    write_whole(folder.data, data.to_json())
    if recipe.engine.deepspeed_json:
        write_whole(folder.deepspeed, Path(recipe.engine.deepspeed_json).read_bytes())
    secret = has_secret(recipe.model_dump(mode="json"))  # which is needed to evaluate the run and to go on from it
    # The last: a folder with this file is a run directory.
    write_whole(folder.recipe, recipe.to_yaml(), mode=0o600 if secret else 0o666)


@contextmanager
def rank_log(path: Path) -> Iterator[None]:
    """Write the log to a file while the body runs. An error that ends the body is logged with its traceback.

    The error gets an attribute `logged_in` with the path, for the message on the terminal.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = LogFile(path)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    except BaseException as error:
        if isinstance(error, TrainingStopped | StartInterrupted) and error.exit_code == RESUMABLE:
            log.info("stopped: %s", error)
        else:
            log.error("the run ended with an error", exc_info=error)
        error.logged_in = str(path)  # type: ignore[attr-defined]
        raise
    finally:
        log.removeHandler(handler)
        handler.close()
