"""Calls into libraries that have no time-outs of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


def call_within(call: Callable[[], _T], timeout_s: float, *, name: str) -> _T:
    """Call a function in a thread that is left behind if the answer takes too long: a call may never return.

    Args:
        call: what to call; it may go on after this function has given up.
        timeout_s: seconds to wait for its answer.
        name: of the thread.

    Raises:
        TimeoutError: there was no answer in time.
        BaseException: what the call raised.
    """
    answers: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, name=name, daemon=True).start()
    try:
        answer, error = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"no answer in {timeout_s:g} s") from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]
