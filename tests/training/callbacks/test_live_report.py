"""The report is written while the run goes on, by a process that leaves nothing behind."""

import time

import pytest

from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback

SETTINGS = {"steps": 4, "log_every": 1, "evaluate_every": 0}
FP32 = {"precision": "fp32", "library": "accelerate", "zero_stage": 0}


class Reader(Callback):
    """Takes the second step when a report is due, and the last when its process has ended."""

    pages: list[str]

    def between_steps(self, done):
        if done == 1:
            time.sleep(1.0)  # record.report_every_s
        if done == 3:
            self.reporter = next(c for c in self.run.callbacks if type(c).__name__ == "LiveReport")
            assert self.reporter._process is not None
            self.reporter._process.wait()
            report = self.run.folder.report
            self.pages.append(report.read_text(encoding="utf-8") if report.is_file() else "")


@pytest.fixture
def pages():
    Reader.pages = []
    return Reader.pages


def test_written_in_between_and_at_the_end(make_recipe, pages):
    run = train(make_recipe(run=SETTINGS, engine=FP32, record={"report_every_s": 1}), callbacks=[Reader])
    (page,) = pages
    assert '<body data-live="1" data-written="' in page
    assert "The run goes on: step " in page
    last = (run / "report.html").read_text(encoding="utf-8")
    assert "data-live=" not in last
    assert "The run goes on" not in last
    assert not list(run.glob(".report*"))


def test_one_that_cannot_be_written_is_logged_once_and_ends_nothing(make_recipe, pages, tmp_path):
    in_the_way = tmp_path / "run" / "report.html"

    class Blocker(Callback):
        def started(self):
            in_the_way.mkdir()

        def ended(self):
            in_the_way.rmdir()

    run = train(make_recipe(run=SETTINGS, engine=FP32, record={"report_every_s": 1}), callbacks=[Blocker, Reader])
    log = (run / "log" / "rank-0.txt").read_text(encoding="utf-8")
    assert log.count("the report on the run so far could not be written") == 1
    assert "is a folder" in log
    assert in_the_way.is_file()


class Due(Callback):
    """Lets a report be due after every step, and waits for its process."""

    def between_steps(self, done):
        reporter = next(c for c in self.run.callbacks if type(c).__name__ == "LiveReport")
        if reporter._process is not None:
            reporter._process.wait()
        reporter._began -= 100


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    """What is started in place of Python: a file that a test writes, or does not."""
    path = tmp_path / "interpreter"
    monkeypatch.setattr("maskmatch_scale.training.callbacks.live_report.sys.executable", str(path))
    return path


@pytest.mark.parametrize(
    ("script", "why"),
    [(None, "No such file or directory"), ("echo hello", r"its process printed 'hello\n' instead of its CPU time")],
)
def test_a_process_that_does_not_start_or_prints_something_else_ends_nothing(script, why, make_recipe, interpreter):
    if script is not None:
        interpreter.write_text(f"#!/bin/sh\n{script}\n")
        interpreter.chmod(0o755)
    run = train(make_recipe(run=SETTINGS, engine=FP32, record={"report_every_s": 1}), callbacks=[Due])
    log = (run / "log" / "rank-0.txt").read_text(encoding="utf-8")
    assert log.count("the report on the run so far could not be written") == 1
    assert why in log


def test_the_page_is_told_the_pause_that_follows_from_what_the_last_one_took(make_recipe, interpreter, tmp_path):
    interpreter.write_text(f'#!/bin/sh\nfor last; do :; done\necho "$last" >> {tmp_path}/told\necho 2.0\n')
    interpreter.chmod(0o755)
    train(make_recipe(run=SETTINGS, engine=FP32, record={"report_every_s": 1}), callbacks=[Due])
    assert (tmp_path / "told").read_text().split() == ["1", "60", "60"]  # a thirtieth of a core, after steps 2, 3, 4


def test_none_if_not_asked_for(make_recipe, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("started a process")

    monkeypatch.setattr("maskmatch_scale.training.callbacks.live_report.subprocess.Popen", refuse)
    monkeypatch.setattr("maskmatch_scale.training.callbacks.live_report.time.monotonic", lambda: 1e9)
    train(make_recipe(run=SETTINGS, engine=FP32, record={"report_every_s": 0}))
