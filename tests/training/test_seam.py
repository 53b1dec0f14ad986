"""A tracker, a monitor or a stopping rule is one class: nothing of the loop, the step or other callbacks is touched."""

import json

import pytest

from maskmatch_scale.errors import TrainingStopped
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback


class Tracker(Callback):
    """Keeps what a tracking service would be sent."""

    def __init__(self, run):
        super().__init__(run)
        self.sent = []
        self.lines = []

    def records_read(self, records):
        self.sent += [(record["step"], record["loss"]) for record in records]

    def evaluated(self, record):
        self.sent.append((record["step"], record["weights"], record["miou"]))

    def said(self, line):
        self.lines.append(line)


class StopAtAccuracy(Callback):
    """A stopping rule: looks at every evaluation."""

    def evaluated(self, record):
        if record["pixel_accuracy"] >= 0:
            self.run.ask_to_stop(f"step {record['step']}: good enough")


class FailsAtTheEnd(Callback):
    def ended(self):
        raise RuntimeError("cannot close")


class Monitor(Callback):
    """Writes down every moment at which it is called, and keeps a count over restarts."""

    def __init__(self, run):
        super().__init__(run)
        self.moments = []
        self.steps_seen = run.resumed.get("steps_seen", 0)

    def started(self):
        self.moments.append("started")

    def before_step(self, step):
        self.moments.append(f"before_step {step}")

    def after_step(self, done, figures):
        self.steps_seen += 1
        self.moments.append(f"after_step {done}")

    def records_read(self, records):
        self.moments.append(f"records_read {[record['step'] for record in records]}")

    def between_steps(self, done):
        self.moments.append(f"between_steps {done}")

    def ended(self):
        self.moments.append("ended")

    def finished(self):
        self.moments.append("finished")

    def state(self):
        return {"steps_seen": self.steps_seen}


class StopAtLoss(Callback):
    """A stopping rule: looks at every record, stops the run with a checkpoint."""

    def wants_records(self, done):
        return True

    def records_read(self, records):
        if records[-1]["step"] == 2:
            self.run.ask_to_stop(f"step 2: the loss is {records[-1]['loss']:.3f}, which is enough")


def made(kinds):
    """Callback makers that keep what they made."""
    found = []

    def maker(kind):
        def make(run):
            found.append(kind(run))
            return found[-1]

        return make

    return [maker(kind) for kind in kinds], found


def test_a_tracker_sees_what_the_file_has(make_recipe):
    makers, found = made([Tracker])
    run = train(make_recipe(run={"steps": 4, "log_every": 3}), callbacks=makers)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if record["kind"] != "checkpoint"]
    assert found[0].sent == [
        (r["step"], r["loss"]) if r["kind"] == "train" else (r["step"], r["weights"], r["miou"]) for r in records
    ]
    assert [line.partition(":")[0] for line in found[0].lines] == ["step 4", "step 4"]  # teacher and student


def test_a_monitor_is_called_at_every_moment_and_keeps_its_state(make_recipe):
    makers, found = made([Monitor])
    settings = {"log_every": 2, "evaluate_every": 0, "checkpoint_every": 2}
    run = train(make_recipe(run=settings | {"steps": 3}), callbacks=makers)
    assert found[0].moments == [
        *("started", "before_step 0", "after_step 1", "between_steps 1"),
        *("before_step 1", "after_step 2", "records_read [1, 2]", "between_steps 2"),
        *("before_step 2", "after_step 3", "records_read [3]", "between_steps 3", "ended", "finished"),
    ]
    assert json.loads((run / "checkpoints" / "step-00000002" / "state.json").read_text())["steps_seen"] == 2
    assert json.loads((run / "summary.json").read_text())["steps_seen"] == 3
    train(make_recipe(run=settings | {"steps": 5}), "auto", callbacks=makers)
    assert found[1].steps_seen == 5


def test_a_stopping_rule_stops_with_a_checkpoint(make_recipe):
    recipe = make_recipe(run={"steps": 9, "log_every": 9, "evaluate_every": 2})
    makers, found = made([Monitor, StopAtLoss])
    with pytest.raises(TrainingStopped, match="which is enough"):
        train(recipe, callbacks=makers)
    assert found[0].moments[-2:] == ["between_steps 2", "ended"]
    checkpoints = found[0].run.folder.checkpoints
    assert (checkpoints / "latest").read_text() == "step-00000002"
    records = [json.loads(line) for line in found[0].run.folder.metrics.read_text().splitlines()]
    assert {record["kind"] for record in records} == {"train", "checkpoint"}  # no evaluation of a run that stops


def test_a_rule_that_goes_by_evaluations_stops_with_a_checkpoint_too(make_recipe):
    recipe = make_recipe(run={"steps": 9, "log_every": 9, "evaluate_every": 2, "checkpoint_every": 4})
    makers, found = made([Monitor, StopAtAccuracy])
    with pytest.raises(TrainingStopped, match="step 2: good enough"):
        train(recipe, callbacks=makers)
    assert [path.name for path in found[0].run.folder.checkpoints.iterdir() if path.is_dir()] == ["step-00000002"]
    state = json.loads((found[0].run.last_checkpoint / "state.json").read_text())
    assert (state["step"], state["steps_seen"]) == (2, 2)


def test_every_callback_is_told_of_the_end_even_if_one_fails(make_recipe):
    recipe = make_recipe(run={"steps": 3, "evaluate_every": 2})
    makers, found = made([FailsAtTheEnd, StopAtAccuracy, Monitor])
    with pytest.raises(RuntimeError, match="cannot close") as raised:
        train(recipe, callbacks=makers)
    assert found[-1].moments[-1] == "ended"
    assert isinstance(raised.value.__context__, TrainingStopped)
