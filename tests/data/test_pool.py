"""The pool of processes: the order of results, how far it looks ahead, and what ends it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.pool import in_threads, results


def wait_for(path: Path | None, number: int) -> int:
    """The number, but not before the file is there."""
    while path is not None and not path.exists():
        time.sleep(0.01)
    return number


def first_waits(item: tuple[int, str]) -> int:
    """The number; number 0 is only ready when the file is there."""
    number, file = item
    return wait_for(Path(file) if number == 0 else None, number)


def threads_or_death(item: int) -> str:
    if item == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return os.environ["OMP_NUM_THREADS"]


def not_three(item: int) -> int:
    assert item != 3, "three"
    return item


def counted(count: int, file: str, taken: list[int]) -> Iterator[tuple[int, str]]:
    for number in range(count):
        taken.append(number)
        yield number, file


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_results_are_in_order_and_items_are_taken_as_needed(tmp_path: Path, workers: int) -> None:
    (tmp_path / "go").touch()
    taken: list[int] = []
    with results(first_waits, counted(40, str(tmp_path / "go"), taken), workers, if_killed="killed") as found:
        assert next(found) == 0
        assert len(taken) == (8 if workers == 2 else 1)
        assert list(found) == list(range(1, 40))


def test_a_slow_item_holds_up_no_other_where_order_does_not_matter(tmp_path: Path) -> None:
    items = counted(12, str(tmp_path / "go"), [])
    with results(first_waits, items, 2, if_killed="killed", ordered=False) as found:
        assert sorted(next(found) for _ in range(11)) == list(range(1, 12))
        (tmp_path / "go").touch()
        assert list(found) == [0]


def first_and_rest(items: range, workers: int) -> tuple[str, list[str]]:
    with results(threads_or_death, items, workers, if_killed="a worker was killed") as found:
        return next(found), list(found)


def test_processes_have_one_thread_each_and_leave_interrupts_to_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert first_and_rest(range(9), 2) == ("1", ["1"] * 8)
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_killed_process_is_told_in_the_words_of_the_caller() -> None:
    with pytest.raises(DataError, match=r"^a worker was killed$"):
        first_and_rest(range(30), 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_function_is_raised_here(workers: int) -> None:
    with (
        pytest.raises(AssertionError, match="three"),
        results(not_three, range(30), workers, if_killed="killed") as found,
    ):
        list(found)


def test_threads_do_not_finish_what_nobody_waits_for(monkeypatch):
    """A chunk of questions to a slow server takes minutes."""
    asked, entered, go = [], threading.Event(), threading.Event()
    shutdown = ThreadPoolExecutor.shutdown

    def ask(item):
        asked.append(item)
        if item == 16:  # the first of the second chunk
            entered.set()
            go.wait()

    def let_go(pool, **options):
        go.set()
        shutdown(pool, **options)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", let_go)
    answers = in_threads(ask, range(64), 1)
    next(answers)
    entered.wait()
    answers.close()
    assert asked == list(range(17))
