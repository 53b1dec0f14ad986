"""A tracker that hangs, breaks or is slow costs its own records, and nothing else."""

import threading

import pytest

from maskmatch_scale.record.trackers.protocol import figures_of
from maskmatch_scale.record.trackers.sending import MOST_UNFLUSHED, Sender


class Kept:
    """A tracker that keeps what it is sent. ``gate`` holds it back; steps in ``bad`` raise."""

    known_as = "kept"

    def __init__(self, gate=None, bad=()):
        self.gate, self.bad = gate, bad
        self.sent, self.flushes, self.outcome = [], 0, None
        self.thread = threading.current_thread()

    def send(self, step, figures):
        if self.gate is not None:
            self.gate.wait()
        if step in self.bad:
            raise ConnectionError(f"no https://me:hunter2@server for {step}")
        self.sent.append((step, figures))

    def flush(self):
        self.flushes += 1

    def close(self, outcome):
        self.outcome = outcome


def record(step):
    return {"step": step, "kind": "train", "loss": 1.0}


def started(*arguments, **options):
    sender = Sender(*arguments, **options)
    sender.start()
    return sender


def ended(sender, outcome="finished", timeout_s=10.0):
    sender.end(outcome)
    sender.join(timeout_s)
    return sender.news()


def test_records_arrive_in_order_in_another_thread():
    made, names = [], []
    sender = started("kept", lambda: made.append(Kept()) or made[0], names.append)
    sender.put([record(1), record(2)])
    sender.put([record(3)])
    assert ended(sender, "stopped") == []
    assert [step for step, _ in made[0].sent] == [1, 2, 3]
    assert made[0].sent[0][1] == {"train/loss": 1.0}
    assert (made[0].outcome, names) == ("stopped", ["kept"])
    assert made[0].thread is not threading.current_thread()
    assert made[0].flushes


def test_a_slow_tracker_loses_what_does_not_fit_and_says_so_once():
    gate = threading.Event()
    made = []
    sender = started("slow", lambda: made.append(Kept(gate)) or made[0], most_waiting=3)
    for step in range(1, 11):
        sender.put([record(step)])  # returns although nothing is taken
    (line,) = sender.news()
    assert line.startswith("warning: tracker slow: it takes records more slowly than they come")
    gate.set()
    lines = ended(sender)
    taken = len(made[0].sent)
    assert 3 <= taken <= 4  # one may have been taken out of the queue before it was full
    assert lines == [
        f"tracker slow: {10 - taken} records did not reach it (it takes records more slowly than they come)"
    ]


def test_one_that_hangs_is_given_up():
    gate = threading.Event()
    sender = started("hung", lambda: Kept(gate))
    sender.put([record(1), record(2), record(3)])
    lines = ended(sender, timeout_s=0.2)
    assert lines == [
        "tracker hung: given up, it could not be closed in time",
        "tracker hung: 3 records did not reach it (it did not answer)",  # with the one in hand
    ]
    gate.set()


@pytest.mark.parametrize("error", [ConnectionError("no https://me:hunter2@server"), SystemExit(1)])
def test_one_that_cannot_be_opened(error):
    def connect():
        raise error

    sender = started("gone", connect)
    sender._thread.join(10)
    sender.put([record(1)])
    sender.put([record(2)])
    lines = sender.news() + ended(sender)
    assert len(lines) == 2
    assert lines[0].startswith(f"warning: tracker gone: {type(error).__name__}")
    assert "2 records did not reach it" in lines[1]
    assert "hunter2" not in "".join(lines)


def test_records_after_one_that_failed_arrive():
    made = []
    sender = started("shaky", lambda: made.append(Kept(bad={2})) or made[0])
    sender.put([record(1), record(2), record(3)])
    lines = ended(sender)
    assert [step for step, _ in made[0].sent] == [1, 3]
    assert "1 records did not reach it" in lines[-1]
    assert "hunter2" not in "".join(lines)


class Keeping(Kept):
    """A tracker that keeps records until it is flushed; the flushes in ``failing`` raise, and what it kept is gone."""

    def __init__(self, failing):
        super().__init__()
        self.failing, self.most_kept, self.arrived = failing, 0, []

    def flush(self):
        kept, self.sent = self.sent, []
        self.most_kept = max(self.most_kept, len(kept))
        if kept:
            self.flushes += 1
            if self.flushes in self.failing:
                raise ConnectionError("server gone")
            self.arrived += kept


def test_what_a_failed_flush_lost_is_counted():
    made = []
    sender = Sender("keeping", lambda: made.append(Keeping(failing={2})) or made[0])
    sender.put([record(step) for step in range(1, MOST_UNFLUSHED + 4)])  # before the thread, so as one batch
    sender.start()
    lines = ended(sender)
    assert made[0].most_kept == MOST_UNFLUSHED
    assert len(made[0].arrived) == MOST_UNFLUSHED
    assert lines[-1] == "tracker keeping: 3 records did not reach it (ConnectionError: server gone)"


def test_one_for_which_the_system_has_no_thread(monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    sender = Sender("late", Kept)
    sender.put([record(1)])
    monkeypatch.setattr(threading.Thread, "start", refuse)
    sender.start()
    sender.put([record(2)])
    assert "late: 2 records did not reach it (RuntimeError: can't start new thread)" in ended(sender)[-1]


def test_names_of_figures():
    assert figures_of(
        {"step": 3, "kind": "train", "loss": 2, "loss_u": None, "skipped": {"not_an_image": 4}, "bad": float("nan")}
    ) == {"train/loss": 2.0, "train/skipped/not_an_image": 4.0}
    assert figures_of({"step": 3, "kind": "eval", "split": "dev", "weights": "ema", "miou": 0.5}) == {
        "dev/ema/miou": 0.5
    }
    assert figures_of({"step": 3, "kind": "checkpoint", "bytes": 9, "error": "full"}) == {"checkpoint/bytes": 9.0}
