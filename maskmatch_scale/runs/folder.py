"""Makes a run directory, after moving an older run aside, and keeps the log of each rank in it.

Decision: docs/decisions/0027-older-run-moved-aside.md.
Decision: docs/decisions/0034-file-names-of-a-run-in-record.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from maskmatch_scale.files import write_whole
from maskmatch_scale.progress import show
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.redact import has_secret
from maskmatch_scale.runs.data import RunData
from maskmatch_scale.runs.log_file import LogFile

log = logging.getLogger("maskmatch_scale")


def open_folder(folder: RunFolder, recipe: Recipe, data: RunData, *, continued: bool) -> None:
    """Make the run directory, and write recipe and data description into it.

    Another run that is there is renamed to `NAME.previous-1` (2, 3, …).

    Args:
        folder: the paths of the run directory.
        recipe: of the run.
        data: what it is trained on.
        continued: whether this run continues the one that is there.

    Raises:
        OSError: it cannot be made. The older run is where it was, and no new one is there.
    """
    run = folder.path
    aside = None
    if not continued and folder.recipe.exists():
        number = next(n for n in range(1, 10_000) if not run.with_name(f"{run.name}.previous-{n}").exists())
        aside = run.with_name(f"{run.name}.previous-{number}")
        run.rename(aside)
    try:
        run.mkdir(parents=True, exist_ok=True)
        _describe(folder, recipe, data)
    except OSError:
        with suppress(OSError):
            if not continued:
                folder.data.unlink(missing_ok=True)
                folder.deepspeed.unlink(missing_ok=True)
                run.rmdir()
            if aside is not None:
                aside.rename(run)
        raise
    if aside is not None:
        show(f"{run} held an older run: moved to {aside}")


def _describe(folder: RunFolder, recipe: Recipe, data: RunData) -> None:
    write_whole(folder.data, data.model_dump_json(indent=1))
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
        log.error("the run ended with an error", exc_info=error)
        error.logged_in = str(path)  # type: ignore[attr-defined]
        raise
    finally:
        log.removeHandler(handler)
        handler.close()
