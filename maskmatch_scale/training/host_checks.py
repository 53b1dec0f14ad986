"""What hosts are compared by when a run starts; several of them, or only this one.

Decision: docs/decisions/0078-hosts-compared-before-they-join.md.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.engine.setup import GRACE_S
from maskmatch_scale.hosts.compare import Report, compare
from maskmatch_scale.hosts.facts import Facts
from maskmatch_scale.hosts.job import JobFacts, token_written
from maskmatch_scale.hosts.links import measure, named
from maskmatch_scale.hosts.meeting import Verdict, has_several_hosts, meet
from maskmatch_scale.recipe import Recipe


def check_hosts(recipe: Recipe, place: Place) -> tuple[str, ...]:
    """Compare the hosts of a job before its ranks join a process group; all ranks call it together.

    On one host there is nothing to compare, and nothing is done.

    Args:
        recipe: with its precision.
        place: of this rank.

    Returns:
        On rank 0 a line on each thing that is only odd; elsewhere none.

    Raises:
        UserError: on all ranks: hosts would not train one model. It names them, what differs, and what to do.
        CommandFailed: on all ranks: others have not come, or have failed.
    """
    if not has_several_hosts(place):
        return ()

    def report(token: str) -> str:
        towards = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        # `label` stands alone for who reads nothing else: hosts of other versions may report other things.
        label = named(socket.gethostname(), place.rank, place.rank + place.local_world_size - 1)
        facts, job = Facts.here(towards), JobFacts.here(recipe, token)
        return json.dumps({"rank": place.rank, "label": label, "facts": facts.values(), "job": job.values()})

    timeout_s = recipe.engine.collective_timeout_s + GRACE_S
    return meet(place, timeout_s, report, token_written(Path(recipe.run.dir)), _judge)


def measure_links(runtime: Runtime) -> tuple[str, ...]:
    """Measure the links between ranks; all ranks call it together, after they have joined and agreed on the recipe.

    Returns:
        On rank 0 a line on what was found, and one on each host that is slow; elsewhere none.
    """
    if runtime.world_size == 1:
        return ()
    links = measure(runtime)
    if runtime.rank != 0:
        return ()
    return (links.line(), *(f"warning: {finding.line}" for finding in links.findings()))


def _judge(texts: Sequence[str]) -> Verdict:
    told = sorted(map(json.loads, texts), key=lambda values: int(values["rank"]))
    reports = [Report(one["label"], Facts.from_values(one["facts"]), JobFacts.from_values(one["job"])) for one in told]
    found = compare(reports, reports[0].label)
    refusal = "; ".join(finding.line for finding in found if finding.stops)
    return Verdict(refusal, tuple(f"warning: {finding.line}" for finding in found if not finding.stops))
