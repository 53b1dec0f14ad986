"""A run that is asked to stop: by real signals, by the clock, in an evaluation; and what comes after."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from maskmatch_scale.errors import RESUMABLE, TrainingStopped, UserError
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.runs.evaluate import evaluate_run
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback, time_limit
from maskmatch_scale.training.callbacks.time_limit import TimeLimit
from tests.conftest import recipe_maker


def records(run, kind="train"):
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def send(run, number):
    """A signal to this process; returns when the run has been told."""
    os.kill(os.getpid(), number)
    until = time.monotonic() + 60
    while not run.agreement.wanted:
        assert time.monotonic() < until
        time.sleep(0.001)


def signalled_in_step(number, step):
    """A callback: the process gets a signal within a step."""

    class Signalled(Callback):
        def before_step(self, before):
            if before + 1 == step:
                send(self.run, number)

    return Signalled


def signalled_in_evaluation(number, step, weights="ema"):
    """A callback: the process gets a signal while images are evaluated after a step, after the first of them."""

    class Signalled(Callback):
        done = calls = 0

        def started(self):
            module = self.run.teacher.module if weights == "ema" else self.run.student
            module.register_forward_pre_hook(lambda *_: self._forward())

        def _forward(self):
            if self.done == step:
                self.calls += 1
                if self.calls == 2:
                    send(self.run, number)

        def after_step(self, done, figures):
            self.done = done

        def before_step(self, step):
            self.done = 0

    return Signalled


SETTINGS = {"steps": 4, "checkpoint_every": 3, "evaluate_every": 2, "log_every": 10}


@pytest.fixture(scope="module")
def whole(shapes, tmp_path_factory):
    """A run of the same recipe that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return train(recipe_maker(shapes, folder)(run=SETTINGS | {"dir": str(folder / "run")}))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_stops_after_the_step_with_a_checkpoint(make_recipe, name):
    recipe = make_recipe(run=SETTINGS | {"evaluate_every": 0}, data={"workers": 1})
    handler = signal.getsignal(getattr(signal, name))
    with pytest.raises(TrainingStopped) as stopped:
        train(recipe, callbacks=[signalled_in_step(getattr(signal, name), 2)])
    checkpoint = RunFolder(Path(recipe.run.dir)).checkpoints / "step-00000002"
    assert str(stopped.value) == f"got {name}; stopped after step 2, checkpoint {checkpoint}"
    assert stopped.value.exit_code == RESUMABLE
    assert signal.getsignal(getattr(signal, name)) == handler
    assert not RunFolder(Path(recipe.run.dir)).lock.exists()
    assert len(records(recipe.run.dir)) == 2  # although they are read every tenth step


@pytest.mark.parametrize(("step", "weights", "there"), [(2, "ema", []), (4, "student", ["ema"])])
def test_a_signal_breaks_an_evaluation_off_and_the_next_start_makes_up_for_it(make_recipe, whole, step, weights, there):
    recipe = make_recipe(run=SETTINGS)
    with pytest.raises(TrainingStopped, match=f"got SIGTERM; stopped after step {step}, checkpoint"):
        train(recipe, callbacks=[signalled_in_evaluation(signal.SIGTERM, step, weights)])
    assert [r["weights"] for r in records(recipe.run.dir, "eval") if r["step"] == step] == there
    train(recipe, "auto")
    assert records(recipe.run.dir, "eval") == records(whole, "eval")
    assert [r["loss"] for r in records(recipe.run.dir)] == [r["loss"] for r in records(whole)]
    train(recipe, "auto")  # there is nothing left to do
    assert records(recipe.run.dir, "eval") == records(whole, "eval")


def test_an_interrupted_evaluation_of_the_last_start_can_be_interrupted_again(make_recipe):
    recipe = make_recipe(run={"steps": 4, "checkpoint_every": 2, "evaluate_every": 2})
    with pytest.raises(TrainingStopped):
        train(recipe, callbacks=[signalled_in_evaluation(signal.SIGTERM, 2)])

    class AtOnce(Callback):
        def __init__(self, run):
            super().__init__(run)
            run.ask_to_stop("no time", RESUMABLE)

    with pytest.raises(TrainingStopped, match="no time; stopped before the first step") as stopped:
        train(recipe, "auto", callbacks=[AtOnce])
    assert stopped.value.exit_code == RESUMABLE
    assert not records(recipe.run.dir, "eval")


def test_signals_that_the_recipe_does_not_name_are_left_alone(make_recipe):
    found = []

    class Look(Callback):
        def started(self):
            found.extend(signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1))

    before = signal.getsignal(signal.SIGTERM)
    train(make_recipe(run={"steps": 1, "stop_signals": ["SIGUSR1"]}), callbacks=[Look])
    assert found[0] == before
    assert found[1] != signal.SIG_DFL


def test_the_time_is_up(make_recipe, monkeypatch):
    class Late(Callback):
        """The time passes within a step."""

        def before_step(self, step):
            if step == 1:
                limit = next(callback for callback in self.run.callbacks if isinstance(callback, TimeLimit))
                limit._over = 0.0

    def soon(run):
        monkeypatch.setattr(time_limit, "_LOOK_S", 0.01)
        return Late(run)

    recipe = make_recipe(run={"steps": 500, "max_hours": 24.0, "evaluate_every": 0})
    with pytest.raises(TrainingStopped, match=r"run\.max_hours=24 are nearly over; stopped after step") as stopped:
        train(recipe, callbacks=[soon])
    assert stopped.value.exit_code == RESUMABLE
    assert 2 <= len(records(recipe.run.dir)) < 500


def test_less_time_than_a_start_takes(make_recipe):
    recipe = make_recipe(run={"steps": 5, "max_hours": 1e-5})
    with pytest.raises(
        TrainingStopped, match=r"run\.max_hours=1e-05 .* raise it; stopped before the first step"
    ) as stopped:
        train(recipe)  # this process is older than that
    assert stopped.value.exit_code == 1


def test_the_margin_grows_with_the_time_that_checkpoints_take(make_recipe):
    class Saved(Callback):
        def before_step(self, step):
            if step == 3:
                self.run.save_s = 7200.0
                limit = next(callback for callback in self.run.callbacks if isinstance(callback, TimeLimit))
                assert limit._margin_s() > 7200

    recipe = make_recipe(run={"steps": 5, "max_hours": 24.0, "evaluate_every": 0, "checkpoint_every": 2})
    run = train(recipe, callbacks=[Saved])
    state = json.loads((run / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["save_s"] == 7200


def test_a_second_live_run_in_the_folder_is_refused(make_recipe):
    recipe = make_recipe(run={"steps": 2})
    seen = []

    class Second(Callback):
        def before_step(self, step):
            folder = self.run.folder.path
            before = sorted(path.name for path in folder.parent.rglob("*"))
            for resume in (None, "auto"):
                with pytest.raises(
                    UserError, match=rf"run\.dir=.*another run writes there \(process {os.getpid()} on "
                ):
                    train(recipe, resume)
            assert sorted(path.name for path in folder.parent.rglob("*")) == before
            seen.append(step)

    train(recipe, callbacks=[Second])
    assert seen == [0, 1]
    evaluate_run(Path(recipe.run.dir), "dev", ("ema",))  # reading needs no lock
