"""How fast two hosts sum a tensor, at several speeds of their link."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.drill_hosts.hosts import Hosts
from benchmarks.drill_hosts.report import Collective, Link
from benchmarks.harness import COMMANDS, ROOT, launch_environment, say

LINKS = (
    *(Link(mbit) for mbit in (None, 1000.0, 200.0, 50.0)),
    *(Link(None, loss, single=True) for loss in (0.0, 0.001, 0.01)),
)
SIZES = (64_000, 1_000_000, 4_000_000, 16_000_000)
REPEATS = 7


def run(work: Path, shards: Path, *, short: bool) -> Iterator[Collective]:
    """One rank on each of two hosts; each host has a core of its own if there are two."""
    links, sizes, repeats = (LINKS[1:2], SIZES[:2], 2) if short else (LINKS, SIZES, REPEATS)
    with Hosts(2, own_cores=True) as hosts:
        hosts.send_larger_packets()
        for link in links:
            say(f"collectives: {link}")
            for host in hosts:
                host.set_link(link.mbit, link.loss, single=link.single)
            ranks = []
            for rank, host in enumerate(hosts):
                place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": hosts[0].name, "MASTER_PORT": "29500"}
                command = [COMMANDS / "python", "-m", "benchmarks.drill_hosts.worker", repeats, *sizes]
                environment = launch_environment(torch.device("cpu")) | place
                file = work / f"collectives-{rank}.txt"
                with file.open("wb") as out:
                    ranks.append((host.start(command, cwd=ROOT, env=environment, stdout=out, stderr=out), file))
            if any(process.wait(timeout=600) for process, _ in ranks):
                raise RuntimeError("a rank has failed:\n" + "\n".join(file.read_text()[-3000:] for _, file in ranks))
            measured = [line.split() for line in ranks[0][1].read_text().splitlines()]
            found = {int(words[0]): float(words[1]) for words in measured if len(words) == 2 and words[0].isdigit()}
            for size in sizes:
                yield Collective(link.mbit, link.loss, link.single, size, found[size])
