"""One rank of a measured run: `maskmatch train` with a callback that notes seconds and bytes of every step."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from maskmatch_scale.recipe import load_recipe
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback


def bytes_of_loopback() -> int:
    """Sent over the loopback of this process's network namespace by all ranks together."""
    for line in Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[8])
    raise OSError("/proc/self/net/dev has no loopback")


class Noted(Callback):
    """(seconds, bytes) at the end of every step, into RUN/steps-RANK.json."""

    def started(self) -> None:
        """Begin."""
        self._noted = [(time.perf_counter(), bytes_of_loopback())]

    def after_step(self, done: int, figures: object) -> None:
        """On a CPU a step is over when it was launched."""
        self._noted.append((time.perf_counter(), bytes_of_loopback()))

    def ended(self) -> None:
        """Write."""
        folder = Path(self.run.recipe.run.dir)
        (folder / f"steps-{self.run.runtime.rank}.json").write_text(json.dumps(self._noted), encoding="ascii")


if __name__ == "__main__":
    train(load_recipe(sys.argv[1], sys.argv[2:]), callbacks=[Noted])
