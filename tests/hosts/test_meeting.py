"""Ranks of three hosts meet, on real processes: what each of them ends with."""

import contextlib
import itertools
import json
import os
import threading
import time

import pytest
import torch
from torch import distributed as dist
from torch.distributed import HashStore

from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.errors import CommandFailed, UserError
from maskmatch_scale.hosts import meeting
from maskmatch_scale.hosts.meeting import Verdict, has_several_hosts, meet, telling_others
from tests.spawned import answers_of

RANKS = 3
MISTAKE = {
    "a mistake": UserError("data.root=/x: no such folder"),
    "a bug": KeyError("https://user:password@store/x?sig=abc"),
}


def place_of(rank, port):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    return Place.from_environment()


@contextlib.contextmanager
def prepared():
    yield "word"


def judge(texts):
    labels = sorted(json.loads(text)["label"] for text in texts)
    if "refuse" in labels[-1]:
        return Verdict("b differs")
    return Verdict(notes=(f"met {', '.join(labels)}",))


def met(place, doing, timeout_s=60.0):
    """Meet the others, and say what came of it."""

    def report(word):
        if doing == f"report of {place.rank} fails":
            raise RuntimeError("disk")
        return json.dumps({"label": f"{word}-{place.rank}{'-refuse' if doing == 'refuse' and place.rank == 2 else ''}"})

    try:
        with telling_others(place):
            if doing in MISTAKE and place.rank == 2:
                raise MISTAKE[doing]
            if doing == "rank 0 fails" and place.rank == 0:
                raise UserError("wrong")
        return list(meet(place, timeout_s, report, prepared(), judge))
    except (UserError, CommandFailed) as error:
        return [type(error).__name__, str(error), error.on_all_ranks]
    except (KeyError, RuntimeError) as error:
        return [type(error).__name__]


def on_a_rank(rank, port, found):
    place = place_of(rank, port)
    for doing in ("first", "refuse", "second", *MISTAKE, "rank 0 fails", *(f"report of {n} fails" for n in range(2))):
        found.put((rank, doing, met(place, doing)))
    # As after a change of hosts under torchrun: other processes, which count anew, and what the earlier ones wrote.
    meeting._MEETINGS = itertools.count()
    time.sleep(1.0 if rank == 0 else 0.0)
    found.put((rank, "anew", met(place, "anew")))
    meeting._MEETINGS = itertools.count(100)
    dist.init_process_group("gloo")  # on the port where this package's store is served
    total = torch.ones(1)
    dist.all_reduce(total)
    found.put((rank, "sum", int(total)))
    if rank != 2:
        found.put((rank, "alone", met(place, "", timeout_s=4.0 if rank == 0 else 20.0)))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers():
    """What each rank ended each meeting with: all in one start of the processes, which takes long."""
    return {(rank, doing): value for rank, doing, value in answers_of(on_a_rank, RANKS)}


def test_ranks_that_pass_meet_as_often_as_they_like_and_join_then(answers):
    for doing in ("first", "second", "anew"):
        assert answers[0, doing] == ["met word-0, word-1, word-2"]
        assert answers[1, doing] == answers[2, doing] == []
    assert [answers[rank, "sum"] for rank in range(RANKS)] == [RANKS] * RANKS


def test_a_refusal_reaches_every_rank(answers):
    assert [answers[rank, "refuse"] for rank in range(RANKS)] == [["UserError", "b differs", True]] * RANKS


@pytest.mark.parametrize(
    ("doing", "kind", "own", "text"),
    [
        (
            "a mistake",
            "UserError",
            ["UserError", "data.root=/x: no such folder", False],
            "data.root=/x: no such folder",
        ),
        ("a bug", "CommandFailed", ["KeyError"], "KeyError: 'https://store/x'"),
    ],
)
def test_a_rank_that_fails_its_own_checks_tells_the_others(answers, doing, kind, own, text):
    assert answers[2, doing] == own
    line = f"rank 2 on {os.uname().nodename} has failed its checks: {text}"
    assert answers[0, doing] == answers[1, doing] == [kind, line, True]


def test_rank_0_tells_the_others_too(answers):
    assert answers[0, "rank 0 fails"] == ["UserError", "wrong", False]
    line = f"rank 0 on {os.uname().nodename} has failed its checks: wrong"
    assert answers[1, "rank 0 fails"] == answers[2, "rank 0 fails"] == ["UserError", line, True]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_report_that_cannot_be_made_ends_all_ranks(answers, failing):
    doing = f"report of {failing} fails"
    assert answers[failing, doing] == ["RuntimeError"]
    line = f"rank {failing} on {os.uname().nodename} has failed its checks: RuntimeError: disk"
    for rank in {0, 1, 2} - {failing}:
        assert answers[rank, doing] == ["CommandFailed", line, True]


def test_ranks_that_do_not_come_are_counted_and_those_that_came_are_named(answers):
    kind, line, _ = answers[0, "alone"]
    assert kind == "CommandFailed"
    assert line.startswith("only 2 of 3 ranks have come within 4 s, those of word-0, word-1; look at the output")
    assert answers[1, "alone"] == answers[0, "alone"]


def test_ranks_beside_rank_0_stay_until_others_have_read():
    """When one of them ends, their launcher ends rank 0, and with it what the others have not read yet."""
    for place, stays in ((Place(1, 1, 4, 2), True), (Place(2, 0, 4, 2), False), (Place(3, 1, 4, 2), False)):
        store = HashStore()
        leaving = threading.Thread(target=meeting._leave, args=(store, place))
        leaving.start()
        leaving.join(0.5)
        assert leaving.is_alive() == stays
        store.add("read", 3)
        leaving.join(30)
        assert not leaving.is_alive()


def test_on_one_host_nobody_is_told(monkeypatch):
    monkeypatch.setattr("maskmatch_scale.hosts.meeting._tell", lambda *_: pytest.fail("told"))
    place = Place(0, 0, 2, 2)
    assert not has_several_hosts(place)
    with pytest.raises(UserError), telling_others(place):
        raise UserError("x")
