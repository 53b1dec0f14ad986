"""Started by a launcher: train every job of a list in one process group, and note after each how it ended.

A job is `name`, `recipe`, and perhaps `resume` and `watch` (`waiting.py`). Rank 0 appends a line to the results for
each: `name`, `error` (a traceback, or null), `seconds`, `waits`. On one rank a job that fails leaves the others alone;
on several the launch ends with it, because the ranks no longer agree.
"""

import json
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.recipe import parse_recipe
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import closing
from tests.gpu.waiting import NoWaiting

closing.write_report = lambda runs: "left out"  # pages are not what these runs are for


def main(jobs, results):
    place = Place.from_environment()
    for job in jobs:
        began, error = time.monotonic(), None
        try:
            train(parse_recipe(job["recipe"]), job.get("resume"), callbacks=[NoWaiting] if job.get("watch") else [])
        except Exception:
            error = traceback.format_exc()
        if place.rank == 0 or error:
            seconds = round(time.monotonic() - began, 1)
            waits = NoWaiting.counts if job.get("watch") else None
            line = json.dumps({"name": job["name"], "error": error, "seconds": seconds, "waits": waits})
            with results.open("a") as file:
                file.write(line + "\n")
        if error and place.world_size > 1:
            raise SystemExit(error)


main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
