"""Calls that are given up after a time."""

import threading

import pytest

from maskmatch_scale.timeouts import call_within


def test_the_answer_or_the_error_of_the_call():
    assert call_within(lambda: 3, 10, name="answers") == 3
    with pytest.raises(KeyError, match="missing"):
        call_within(lambda: {}["missing"], 10, name="raises")


def test_a_call_that_does_not_return_is_given_up():
    never = threading.Event()
    with pytest.raises(TimeoutError, match="no answer in"):
        call_within(never.wait, 0.01, name="waits")
    assert "waits" in [thread.name for thread in threading.enumerate()]
    never.set()
