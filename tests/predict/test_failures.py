"""The exit code of several ranks: an error only when no other rank is at work, and then if any image failed."""

from __future__ import annotations

import itertools

import pytest

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.predict.failures import Failures

BAD = BadSample("not_an_image", "x.png: not a readable image")


def ranks(out, count):
    started = [Failures(out, Place(rank, rank, count, count)) for rank in range(count)]
    for each in started:
        each.begin()
        each.forget_earlier()
    return started


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
@pytest.mark.parametrize("failing", [None, 0, 2])
def test_only_the_last_rank_to_finish_tells_of_failures(tmp_path, order, failing):
    for _ in range(2):  # a second start goes on in the same folder
        started = ranks(tmp_path, 3)
        if failing is not None:
            started[failing].add("x.png", BAD)
        said = [started[rank].say_by_exit_code() for rank in order]
        assert said == [False, False, failing is not None]
        assert not list(tmp_path.glob(".*"))


def test_a_rank_that_died_leaves_the_exit_code_to_itself(tmp_path):
    first, second, _ = ranks(tmp_path, 3)
    first.add("x.png", BAD)
    assert [first.say_by_exit_code(), second.say_by_exit_code()] == [False, False]
    # What they left does not make a rank of the next start the last one.
    first, second, third = ranks(tmp_path, 3)
    third.add("x.png", BAD)
    assert [third.say_by_exit_code(), first.say_by_exit_code(), second.say_by_exit_code()] == [False, False, True]


def test_other_files_of_such_names_stay(tmp_path):
    (tmp_path / "failed-kept.jsonl").touch()
    (tmp_path / "failed.jsonl").touch()
    ranks(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["failed-kept.jsonl"]


def test_lists_of_other_numbers_of_ranks_are_removed(tmp_path):
    for each in ranks(tmp_path, 3):
        each.add("x.png", BAD)
    ranks(tmp_path, 2)[1].add("x.png", BAD)
    assert [path.name for path in tmp_path.iterdir()] == ["failed-rank-1.jsonl"]
    ranks(tmp_path, 1)[0].add("x.png", BAD)
    assert [path.name for path in tmp_path.iterdir()] == ["failed.jsonl"]
