"""Which host has a slow link: told from pairs; and what is measured on real processes."""

import time

import pytest
import torch
from torch import distributed as dist

from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.members import Member
from maskmatch_scale.engine.processes import Process
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.hosts.links import Links, measure, pairings
from tests.spawned import answers_of

RANKS = 3


@pytest.mark.parametrize("hosts", [2, 3, 4, 5, 8, 9])
def test_every_host_meets_another_partner_in_each_round(hosts):
    rounds = pairings(range(0, 8 * hosts, 8), 100)
    assert len(rounds) == (hosts - 1 if hosts % 2 == 0 else hosts)
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(set(met)) == len(met) == hosts * (hosts - 1) // 2
    for pairs in rounds:
        in_it = [host for pair in pairs for host in pair]
        assert len(set(in_it)) == len(in_it) == hosts // 2 * 2
    assert pairings(range(0, 8 * hosts, 8), 2) == rounds[:2]
    assert pairings([0], 3) == []


def test_the_slow_host_is_named():
    links = Links(24, 9e9, {"a": 11e9, "b": 12e9, "c": 3e9}, {"a": 5.0, "b": 5.1, "c": 5.0})
    (finding,) = links.findings()
    assert "the link of c is slow: 3 GB/s with each of its partners, elsewhere 11 GB/s" in finding.line
    assert links.line() == (
        "links: all-reduce over 24 ranks 9 GB/s; a pair of hosts 11 GB/s each way, the slowest host 3 GB/s: c"
    )
    two = Links(2, 9e6, {"a": 1e7, "b": 1e7}, {"a": 5.0, "b": 65.0})
    assert two.line() == "links: all-reduce over 2 ranks 9 MB/s; a pair of hosts 10 MB/s each way"
    assert [finding.line[:25] for finding in two.findings()] == ["the clock of b is +60.0 s"]


def on_a_rank(rank, port, found):
    """A host of its own; rank 2 is slow to take and to send, and its clock goes ahead."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    members = tuple(Member(f"host-{number}", Process(number, ""), None) for number in range(RANKS))
    runtime = Runtime(Place(rank, 0, RANKS, 1), torch.device("cpu"), 1, members)
    if rank == 2:
        clock, transfer = time.time, Runtime._transfer
        time.time = lambda: clock() + 100

        def slowly(self, transfers):
            time.sleep(0.3)
            transfer(self, transfers)

        Runtime._transfer = slowly
    before = torch.random.get_rng_state()
    links = measure(runtime)
    assert torch.equal(before, torch.random.get_rng_state())
    found.put((rank, links, runtime.collectives_called()))
    dist.barrier()
    dist.destroy_process_group()


def test_links_are_measured_alike_on_all_ranks():
    answers = {rank: (links, called) for rank, links, called in answers_of(on_a_rank, RANKS)}
    links, called = answers[0]
    assert all(answer == (links, called) for answer in answers.values())
    assert set(links.hosts) == {f"host-{rank} (rank {rank})" for rank in range(RANKS)}
    assert links.all_reduce > 0
    lines = [finding.line for finding in links.findings()]
    assert any("the clock of host-2 (rank 2) is +100.0 s" in line for line in lines)
    assert any("the link of host-2 (rank 2) is slow" in line for line in lines)
