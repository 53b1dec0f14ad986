"""Ranks as processes of a test, without a launcher."""

from torch import multiprocessing

from maskmatch_scale.engine.setup import _free_port


def answers_of(on_a_rank, ranks):
    """What so many processes put into a queue, each calling ``on_a_rank(rank, port, queue)``; in no order."""
    found = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.spawn(on_a_rank, (_free_port(), found), nprocs=ranks)
    answers = []
    while not found.empty():
        answers.append(found.get())
    return answers
