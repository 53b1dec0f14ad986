"""What all phases of the drill share: shards on a server, recipes, and the run that nothing happens to."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.drill.evidence import compare_samples, steps_again
from benchmarks.drill.job import Job
from benchmarks.harness import say
from benchmarks.small_runs import RECIPE, compare_losses, compare_states
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.seeds import derive_seed
from tests.data.faulty_server import FaultyServer

SAVE_EVERY = RECIPE["run"]["checkpoint_every"]
"""Steps between checkpoints. All runs end after a multiple of it, where the run that nothing happens to has one too."""

_LEAST_STEPS = 6 * SAVE_EVERY
"""Of the run that nothing happens to: as many as the first phases of a short drill need."""

Sections = Mapping[str, Mapping[str, Any]]


@dataclass
class Setting:
    """Where the drill takes place."""

    work: Path
    """A folder of its own."""
    seed: int
    kills: int
    """Kills of one job."""
    server: FaultyServer
    launchers: tuple[str, ...]
    """Which launchers take turns."""
    plain: str = "none"
    """How sessions start whose launcher does not matter: `none` or `preloaded`."""
    short: bool = False
    """Only a few cases of each phase."""
    now: str = "starting"
    """What is being done, for the line of progress."""
    jobs: list[Job] = field(default_factory=list)
    """All that were made."""
    _references: dict[str, Job] = field(default_factory=dict)

    def random(self, *what: str | int) -> random.Random:
        """A generator for one purpose, made from the seed."""
        return random.Random(derive_seed(self.seed, *what))

    def job(self, name: str, steps: int, sections: Sections | None = None, run: Path | None = None) -> Job:
        """A job that was not started yet.

        Args:
            name: of its folder.
            steps: of its run.
            sections: keys that replace those of `RECIPE`.
            run: run directory; None: in its folder.
        """
        content = {key: dict(section) for key, section in RECIPE.items()}
        for key, section in (sections or {}).items():
            content[key] |= section
        content["data"].setdefault("root", self.server.url)
        content["run"] |= {"steps": steps, "seed": self.seed}
        self.jobs.append(Job(self.work / name, content, run))
        return self.jobs[-1]

    def reference(self, steps: int, sections: Sections | None = None) -> Job:
        """The run that nothing happens to, with all of its checkpoints; made when it is first asked for, or longer.

        Args:
            steps: that it must have taken.
            sections: as in :meth:`job`.
        """
        steps = max(steps, _LEAST_STEPS)
        name = f"reference-{derive_seed(0, repr(sections))}"
        job = self._references.get(name)
        if job is None or max(record["step"] for record in job.records()) < steps:
            if job is not None:
                shutil.rmtree(job.folder)
            job = self.job(name, steps, {**(sections or {}), "run": {"keep_last": 10_000}})
            self.now = f"the run that nothing happens to, {steps} steps"
            say(self.now)
            session = job.finish(self.plain)
            if session.codes != [0, 0]:
                raise RuntimeError(f"the run that nothing happens to has failed:\n{session.printed[-3000:]}")
            self._references[name] = job
        return job

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Samples of an epoch of each source."""
        index = load_index(str(self.work / "shards"))
        return {name: index.stream(name).samples for name in ("labelled", "unlabelled")}

    def losses(self, job: Job, steps: int, sections: Sections | None = None) -> dict[str, Any]:
        """Figures of a row: what a job lost of its ``steps`` steps."""
        other = self.reference(steps, sections)
        samples = compare_samples(job, other, steps, self.sizes)
        weights = float("inf")
        if job.checkpoint(steps).is_dir():
            weights = compare_states(job.checkpoint(steps), other.checkpoint(steps))
        return {
            "steps": steps,
            "steps_again": steps_again(job),
            "lost": samples.lost,
            "repeated": samples.repeated,
            "moved_steps": samples.moved_steps,
            "losses": compare_losses(job.run, other.run, steps),
            "weights": weights,
            "outlived": outlived(job),
        }


def outlived(job: Job) -> int:
    """Processes that outlived their sessions."""
    return sum(session.outlived for session in job.sessions)
