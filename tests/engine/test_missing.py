"""Which ranks did not come, told from what they last wrote."""

import dataclasses

import pytest

from maskmatch_scale.engine.members import Member
from maskmatch_scale.engine.missing import Heartbeat, died, died_elsewhere, find_missing, is_behind
from maskmatch_scale.engine.processes import Process

LIMIT_S = 100


def members(ranks):
    return [Member(f"host-{rank // 2}", Process(1000 + rank, f"host-{rank // 2}"), None) for rank in range(ranks)]


def beat(called, still_s, *, at=50.0, **more):
    """What a rank wrote: collectives called in two groups, and seconds since the last of them."""
    counts = called if isinstance(called, dict) else {"0": called, "1": 7}
    return Heartbeat(at, counts, still_s, more.pop("step", 3), more.pop("doing", "training.step.take_step:81"), **more)


def find(now, earlier=None, states=None):
    """The finding for ranks of which each had written something else before."""
    earlier = earlier or [each and dataclasses.replace(each, at=each.at - 50) for each in now]
    return find_missing(members(len(now)), states or ["unknown"] * len(now), earlier, now, LIMIT_S)


def test_the_rank_that_called_fewer_collectives_is_named():
    found = find([beat(9, 101), beat(8, 130, doing="data.batches.loading.load:90"), beat(9, 101)])
    assert (found.missing, found.waiting) == ((1,), (0, 2))
    assert found.line.startswith(
        "another rank did not join a collective within the time limit (engine.collective_timeout_s=100): rank 1 "
        "(host host-0, process 1001) is at step 3, in data.batches.loading.load:90, for 130 s, last heard of at "
    )
    assert "; rank 0 waits for it at step 3, in training.step.take_step:81, for 101 s; its log" in found.line
    assert "\n" not in found.line


def test_nobody_is_missing_while_all_compute():
    found = find([beat(9, 500), beat(9, 101)])
    assert not found.missing
    assert not found.waiting
    assert "no rank waits for another" in found.line


def test_a_rank_is_not_late_before_another_has_waited_for_the_whole_limit():
    late = [beat(8, 130), beat(9, 20)]
    assert not find(late).waiting
    assert is_behind(0, late)
    assert not is_behind(1, late)


def test_a_rank_that_waits_for_a_later_one_is_not_to_blame():
    found = find([beat(9, 101), beat(8, 110), beat(7, 130)])
    assert found.missing == (2,)


@pytest.mark.parametrize("state", ["unknown", "running"])
def test_a_rank_that_writes_nothing_more_is_missing_even_if_it_called_as_many(state):
    now = [beat(9, 101), beat(9, 3)]
    found = find(now, earlier=[beat(9, 50, at=0.0), beat(9, 3)], states=["running", state])
    assert (found.missing, found.waiting) == ((1,), (0,))
    assert "its process hangs, or its machine or the network is down" in found.line


def test_a_rank_that_never_wrote_is_missing():
    found = find([beat(9, 101), None], earlier=[beat(9, 50, at=0.0), None])
    assert found.missing == (1,)
    assert "rank 1 (host host-0, process 1001), which has written nothing" in found.line


@pytest.mark.parametrize(("state", "remedy"), [("stopped", "let it go on, or end it"), ("ended", "out of memory?")])
def test_what_the_system_says_of_a_process(state, remedy):
    found = find([beat(9, 101), beat(9, 3)], states=["running", state])
    assert found.missing == (1,)
    assert f"process 1001, {state})" in found.line
    assert remedy in found.line


def test_a_finished_rank_is_not_missed_unless_others_wait_for_it():
    """Rank 0 writes the report while the processes of the others have ended."""
    writing = [beat(9, 101), beat(9, 3, left="finished")]
    assert not find(writing, earlier=writing, states=["running", "ended"]).waiting
    waiting = [beat(10, 101), beat(9, 3, left="finished")]
    found = find(waiting, earlier=[beat(10, 51, at=0.0), writing[1]], states=["running", "ended"])
    assert found.missing == (1,)
    assert "has finished its run" in found.line


def test_a_rank_that_failed_is_missed():
    found = find([beat(9, 101), beat(9, 3, left="failed")], states=["running", "ended"])
    assert found.missing == (1,)
    assert "has ended its run with an error" in found.line


def test_ranks_that_wait_in_different_collectives():
    found = find([beat({"0": 9, "1": 7}, 101), beat({"0": 8, "1": 8}, 101)])
    assert (found.missing, found.waiting) == ((), (0, 1))
    assert "wait for each other in different collectives" in found.line


def test_ranks_that_wait_in_different_collectives_of_one_group():
    found = find([beat(9, 101, last="all_gather"), beat(9, 101, last="all_reduce [[3, 3]]")])
    assert (found.missing, found.waiting) == ((), (0, 1))
    assert "(last collective: all_gather)" in found.line
    assert "(last collective: all_reduce [[3, 3]])" in found.line
    alike = find([beat(9, 101, last="all_gather"), beat(9, 101, last="all_gather"), beat(9, 3)])
    assert not alike.waiting


def test_many_ranks_are_not_all_listed():
    found = find([beat(9, 101)] + [beat(8, 120)] * 20)
    assert found.missing == tuple(range(1, 21))
    assert found.line.startswith("other ranks did not join")
    assert "rank 8 (" in found.line
    assert "rank 9 (" not in found.line
    assert "; and 12 more; rank 0 waits for them" in found.line


def test_a_death():
    assert died(3, members(4)[3]).startswith("another rank has died: rank 3 (host host-1, process 1003, ended); ")


def test_a_host_of_which_nothing_is_heard_is_named_once():
    """Ranks 2–3 are on host-1, 4–5 on host-2."""
    now = [beat(9, 101), beat(9, 101), *[beat(9, 3)] * 4]
    earlier = [beat(9, 50, at=0.0), beat(9, 50, at=0.0), *[beat(9, 3)] * 4]
    found = find(now, earlier, ["running"] * 2 + ["unknown"] * 4)
    assert found.missing == (2, 3, 4, 5)
    assert "rank 2 (host host-1, process 1002)" in found.line
    assert "rank 4 (host host-2, process 1004)" in found.line
    assert "rank 3" not in found.line
    assert "; and 2 more; rank 0 waits for them" in found.line
    assert found.line.endswith(
        "no rank of hosts host-1, host-2 is heard of: each of them is down or cut off from the network, or its "
        "processes hang: look there"
    )


def test_a_host_of_which_one_rank_is_heard_is_not_lost():
    now = [beat(9, 101), beat(9, 101), beat(9, 101), beat(9, 3)]
    earlier = [*[beat(9, 50, at=0.0)] * 3, beat(9, 3)]
    found = find(now, earlier)
    assert found.missing == (3,)
    assert "no rank of host" not in found.line
    assert "its process hangs" in found.line


def test_a_death_on_another_machine():
    def wrote(*at):
        return [beat(9, 3, at=when) for when in at]

    assert died_elsewhere(members(4), wrote(1, 1, 1, 1), wrote(2, 2, 2, 2)) is None
    line = died_elsewhere(members(4), wrote(1, 1, 1, 1), wrote(2, 2, 1, 2))
    assert line.startswith("another rank has died: rank 2 (host host-1, process 1002); a connection was closed")
    line = died_elsewhere(members(20), wrote(*[1] * 20), wrote(2, *[1] * 19))
    assert line.startswith("other ranks have died: rank 1 (")
    assert "rank 8 (" in line
    assert "rank 9 (" not in line
    assert "; and 11 more; " in line


def test_a_death_of_the_rank_whose_address_all_write_to():
    assert died_elsewhere(members(4), None, None).startswith("another rank has died: rank 0 (host host-0, ")


def test_a_death_on_this_machine_is_not_taken_for_one_elsewhere():
    near = [Member("here", Process.own(), None)] * 2
    assert died_elsewhere(near, [beat(9, 3)] * 2, [beat(9, 3)] * 2) is None
    assert died_elsewhere(near, None, None) is None
