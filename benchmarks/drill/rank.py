"""A rank of a job: ``-m benchmarks.drill.rank train RECIPE …`` is ``maskmatch train``, and notes what it does.

Nothing large is imported here, because `maskmatch train` listens to signals before it imports torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from maskmatch_scale.cli.main import main


def _train(recipe: Any, resume: str | None = None) -> Path:
    from benchmarks.drill.witness import Witness
    from maskmatch_scale.training.loop import train

    return train(recipe, resume, callbacks=[Witness])


def run() -> None:
    """Run the command line of this process."""
    # The command imports `train` by this name when it runs. So it has another callback and is otherwise as it is.
    watched = ModuleType("maskmatch_scale.train")
    watched.train = _train  # type: ignore[attr-defined]
    sys.modules[watched.__name__] = watched
    main()


if __name__ == "__main__":
    run()
