"""Ranks that stop after the same step, although one of them wants to: three real processes."""

import threading

import pytest
import torch
from torch import distributed as dist

from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.errors import RESUMABLE
from maskmatch_scale.training.agreement import READ_AFTER, Agreement, Stop
from tests.spawned import answers_of

RANKS = 3
WISHES = {
    # name: rank: (after which exchange, what)
    "one": {1: (4, Stop("got SIGUSR1", RESUMABLE))},
    "several": {1: (4, Stop("got SIGTERM", RESUMABLE)), 2: (4, Stop("got SIGTERM", RESUMABLE))},
    # A run that failed is not to be started again, although another rank got a signal.
    "failure": {0: (4, Stop("got SIGTERM", RESUMABLE)), 2: (4, Stop("grüße: too many failed saves", 1))},
    "other code": {2: (0, Stop("why", 9))},
    "none": {},
}


def steps_of(runtime, wishes, steps=20):
    """Step and decision of a rank that goes on until all know."""
    agreement = Agreement(runtime)
    for step in range(steps):
        if runtime.rank in wishes and wishes[runtime.rank][0] == step:
            agreement.ask(wishes[runtime.rank][1])
        agreement.exchange()
        if agreement.decided:
            return step, agreement.decided
    agreement.settle()
    return steps, agreement.decided


def on_a_rank(rank, port, found):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    runtime = Runtime(Place(rank, rank, RANKS, RANKS), torch.device("cpu"), 1)
    for name, wishes in WISHES.items():
        found.put((name, rank, *steps_of(runtime, wishes)))
    late = Agreement(runtime)  # as in an evaluation, or after the last step
    late.exchange()
    if rank == 1:
        late.ask(Stop("late", RESUMABLE))
    late.settle()
    found.put(("settled", rank, 0, late.decided))
    found.put(("text", rank, 0, runtime.text_of(2, "ü" * 4000 if rank == 2 else "not mine")))
    found.put(("empty", rank, 0, runtime.text_of(0, "")))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers():
    """By name: what each rank found, rank 0 first."""
    by_name = {}
    for name, rank, step, decided in answers_of(on_a_rank, RANKS):
        by_name.setdefault(name, {})[rank] = (step, decided)
    return {name: [of_ranks[rank] for rank in range(RANKS)] for name, of_ranks in by_name.items()}


@pytest.mark.parametrize(
    ("name", "step", "decided"),
    [
        ("one", 4 + READ_AFTER, Stop("rank 1: got SIGUSR1", RESUMABLE)),
        ("several", 4 + READ_AFTER, Stop("rank 1: got SIGTERM", RESUMABLE)),
        ("failure", 4 + READ_AFTER, Stop("rank 2: grüße: too many failed saves", 1)),
        ("other code", READ_AFTER, Stop("rank 2: why", 9)),
        ("none", 20, None),
        ("settled", 0, Stop("rank 1: late", RESUMABLE)),
        ("text", 0, "ü" * 2048),
        ("empty", 0, ""),
    ],
)
def test_all_ranks_know_at_the_same_step(answers, name, step, decided):
    assert answers[name] == [(step, decided)] * RANKS


def test_a_single_rank_knows_at_once_and_a_failure_outranks_a_signal():
    agreement = Agreement(Runtime(Place(0, 0, 1, 1), torch.device("cpu"), 1))
    assert agreement.decided is None
    wishes = [Stop("got SIGTERM", RESUMABLE), Stop("got SIGINT", RESUMABLE), Stop("failed", 1), Stop("late", 75)]
    known = []
    for wish in wishes:
        thread = threading.Thread(target=agreement.ask, args=(wish,))
        thread.start()
        thread.join()
        known.append(agreement.decided)
    assert known == [wishes[0], wishes[0], wishes[2], wishes[2]]
