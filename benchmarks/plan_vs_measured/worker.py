"""One rank, started by the deepspeed launcher: `--module benchmarks.plan_vs_measured.worker FILE`.

FILE holds `cases`, and `result`, the file that rank 0 writes: a list with what `measure` gives for each case, of the
rank that needs most.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import distributed as dist

from benchmarks.harness import say
from benchmarks.plan_vs_measured.cases import Case
from benchmarks.plan_vs_measured.measure import measure
from maskmatch_scale.engine import setup
from maskmatch_scale.engine.launchers import Place


def main(file: Path) -> None:
    """Measure all cases; rank 0 writes what was found."""
    options = json.loads(file.read_text())
    place = Place.from_environment()
    chosen = [Case(**case) for case in options["cases"]]
    runtime = setup.start(place, chosen[0].recipe.engine)
    rows = []
    for case in chosen:
        ranks: list[Any] = [None] * runtime.world_size
        dist.all_gather_object(ranks, measure(case, runtime))
        rows.append(asdict(case) | {name: max(rank[name] for rank in ranks) for name in ranks[0]})
        if runtime.rank == 0:
            say(str(rows[-1]))
            Path(options["result"]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
