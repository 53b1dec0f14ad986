"""Weights & Biases, online or, with WANDB_MODE=offline, as files in RUN/wandb for `wandb sync`."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import uuid4

import wandb

from maskmatch_scale.record.trackers.protocol import Outcome, TrackedRun


class Wandb:
    """One run of W&B over all starts. Entity, server and key are taken from wandb's own variables and `wandb login`.

    Raises:
        RuntimeError: no key is there. wandb would ask for one on the terminal, where the run shows its progress.
    """

    def __init__(self, run: TrackedRun) -> None:
        online = wandb.setup().settings.mode in ("online", "shared")
        if online and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key: run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline")
        self.known_as = run.known_as or uuid4().hex[:8]
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=self.known_as,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.recipe),
            settings=wandb.Settings(
                console="off",  # else it replaces sys.stdout, where the progress is shown
                silent=True,
                save_code=False,
                disable_git=True,  # the address of a repository may hold a token
                x_disable_meta=True,  # it has the command line, which may hold addresses with passwords
            ),
        )
        # Steps are figures, because W&B's own step cannot go back, and a run that continues takes some steps again.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def send(self, step: int, figures: Mapping[str, float]) -> None:
        """Log the figures with their step."""
        self._run.log({"step": step, **figures})

    def flush(self) -> None:
        """Nothing: wandb's own process sends."""

    def close(self, outcome: Outcome) -> None:
        """Finish the run; one that did not take all its steps is shown as failed until it goes on."""
        self._run.finish(exit_code=0 if outcome == "finished" else 1)
