"""Opening a run directory, with an older run moved aside; and the log that each rank keeps in it."""

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
    """Make the run directory and write what the run is; another run in its place is moved aside, never overwritten.

    Args:
        folder: its paths.
        recipe: of the run.
        data: what it is trained on.
        continued: whether the run goes on that lies there already.
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
    """Log to a file meanwhile; an error that ends the run is written there with its traceback.

    The error gets an attribute `logged_in`, the path, for the message on the terminal.
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
