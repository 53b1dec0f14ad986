"""Makes a run directory, after moving an older run aside, and keeps the log of each rank in it.

Decision: docs/decisions/0027-older-run-moved-aside.md.
Decision: docs/decisions/0034-file-names-of-a-run-in-record.md.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskmatch_scale.recipe import Recipe
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.runs.data import RunData

log = logging.getLogger("maskmatch_scale")


def open_folder(folder: RunFolder, recipe: Recipe, data: RunData, *, continued: bool) -> None:
    """Make the run directory, and write recipe and data description into it.

    Another run that is there is renamed to `NAME.previous-1` (2, 3, …).

    Args:
        folder: the paths of the run directory.
        recipe: of the run.
        data: what it is trained on.
        continued: whether this run continues the one that is there.
    """
    run = folder.path
    if not continued and folder.recipe.exists():
        number = next(n for n in range(1, 10_000) if not run.with_name(f"{run.name}.previous-{n}").exists())
        aside = run.with_name(f"{run.name}.previous-{number}")
        run.rename(aside)
        print(f"{run} held an older run: moved to {aside}", flush=True)  # noqa: T201
    run.mkdir(parents=True, exist_ok=True)
    folder.recipe.write_text(recipe.to_yaml())
    folder.data.write_text(data.model_dump_json(indent=1))
    if recipe.engine.deepspeed_json:
        shutil.copyfile(recipe.engine.deepspeed_json, folder.deepspeed)


@contextmanager
def rank_log(path: Path) -> Iterator[None]:
    """Write the log to a file while the body runs. An error that ends the body is logged with its traceback.

    The error gets an attribute `logged_in` with the path, for the message on the terminal.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
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
