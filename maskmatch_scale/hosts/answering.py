"""What this host answers when another asks it over ssh (`hosts/by_ssh.py`)."""

from __future__ import annotations

import time
from typing import Any

from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.setup import start
from maskmatch_scale.hosts.facts import Facts
from maskmatch_scale.hosts.job import JobFacts
from maskmatch_scale.hosts.links import measure
from maskmatch_scale.recipe import EngineRecipe, Recipe

_SSH_PORT = 22
_LINKS_S = 60
"""How long the ranks of other hosts may take to come."""


def report(recipe: Recipe | None, token: str, towards: str) -> dict[str, Any]:
    """What this host is, as values of JSON: `facts`, `job` (None without a recipe) and `time`, by its clock.

    Args:
        recipe: of the job.
        token: see :meth:`maskmatch_scale.hosts.job.JobFacts.here`.
        towards: the host of rank 0.
    """
    facts = Facts.here((towards, _SSH_PORT)).values()
    job = None if recipe is None else JobFacts.here(recipe, token).values()
    return {"facts": facts, "job": job, "time": time.time()}


def links() -> dict[str, Any]:
    """Measure the links between hosts as one rank of a job: `links`, a line on them, and `slow`, on slow ones."""
    runtime = start(Place.from_environment(), EngineRecipe(library="accelerate", collective_timeout_s=_LINKS_S))
    found = measure(runtime)
    return {"links": found.line(), "slow": [finding.line for finding in found.findings()], "time": time.time()}
