"""Trackers are sent what stands in `metrics.jsonl`: read back from the libraries' own files, over a restart."""

import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from maskmatch_scale.errors import TrainingStopped, UserError
from maskmatch_scale.recipe.trackers import TRACKERS
from maskmatch_scale.record.trackers.protocol import figures_of
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback
from maskmatch_scale.training.callbacks.trackers import Trackers, _names_in
from tests.data.faulty_server import FaultyServer

FP32 = {"precision": "fp32", "library": "accelerate", "zero_stage": 0}
SECRET = "hunter2"


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """These runs take seconds, on a busy machine less than the import of a library."""
    monkeypatch.setattr("maskmatch_scale.training.callbacks.trackers.CLOSING_S", 120.0)


class StopAfterTwo(Callback):
    """Stops the first start after step 2, before its evaluation; the second start makes up for that."""

    def after_step(self, done, figures):
        if done == 2:
            self.run.ask_to_stop("that is enough")


def settings(tracker, **run):
    steps = {"steps": 5, "log_every": 1, "evaluate_every": 2, "checkpoint_every": 2}
    return {"engine": FP32, "record": {"trackers": [tracker], "project": "shapes"}, "run": steps | run}


@pytest.fixture
def in_two_starts(make_recipe):
    """Trains with a tracker in two starts, the second of which takes steps 3 to 5; gives the run directory."""

    def run(tracker):
        recipe = make_recipe(**settings(tracker))
        with pytest.raises(TrainingStopped, match="enough"):
            train(recipe, callbacks=[StopAfterTwo])
        first = json.loads((Path(recipe.run.dir) / "trackers.json").read_text())
        folder = train(recipe, "auto")
        assert json.loads((folder / "trackers.json").read_text()) == first
        return folder, first[tracker]

    return run


def run_command(*arguments, **variables):
    """`maskmatch …` in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD", "LOCAL_", "MASTER_"))}
    command = [sys.executable, "-m", "maskmatch_scale", *arguments]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)


def recorded(folder):
    """The figures that the tracker must have: {(name, step): value}; of a record that came twice, the later one."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(name, line["step"]): value for line in lines for name, value in figures_of(line).items()}


def check_no_secret(folder):
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "recipe.yaml":
            assert SECRET.encode() not in path.read_bytes(), path


def check(found, folder, rel=1e-6):
    wanted = recorded(folder)
    assert {"train/loss", "dev/ema/miou", "dev/student/miou", "checkpoint/write_s"} <= {name for name, _ in wanted}
    assert found.keys() == wanted.keys()
    assert {key: pytest.approx(value, rel=rel) for key, value in wanted.items()} == found


def test_tensorboard(in_two_starts):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = in_two_starts("tensorboard")
    assert len(list((folder / "tensorboard").glob("events.*"))) == 2  # one a start
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    found = {(name, event.step): event.value for name in events.Tags()["scalars"] for event in events.Scalars(name)}
    check(found, folder, rel=1e-4)
    (text,) = {e.tensor_proto.string_val[0] for e in events.Tensors("recipe/text_summary")}
    assert b"project: shapes" in text


def wandb_records(path):
    """The records of a `.wandb` file: protobuf messages in the blocks of a LevelDB log, after 7 bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # too little for a header is left of the block
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole record, or its last piece
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb_offline(in_two_starts, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    # W&B records the command line of a run; ours may hold an address with a password.
    monkeypatch.setattr(sys, "argv", ["maskmatch", f"data.root=https://me:{SECRET}@server/"])
    folder, run_id = in_two_starts("wandb")
    found, configs = {}, []
    files = sorted((folder / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert len(files) == 2  # `wandb sync` puts both into the run of this id
    for record in (record for file in files for record in wandb_records(file)):
        configs += [item.value_json for item in record.run.config.update if item.key == "record"]
        items = record.history.item
        figures = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
        found |= {(key, figures["step"]): value for key, value in figures.items() if "/" in key}
    check(found, folder)
    assert json.loads(configs[0])["project"] == "shapes"
    check_no_secret(folder)


def test_mlflow_local_store(in_two_starts, monkeypatch, tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setattr(sys, "argv", ["maskmatch", f"data.root=https://me:{SECRET}@server/"])
    folder, run_id = in_two_starts("mlflow")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("shapes")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "run", "FINISHED")
    assert run.data.params["method.scales"] == "[1.0]"
    found = {(name, m.step): m.value for name in run.data.metrics for m in client.get_metric_history(run_id, name)}
    check(found, folder)
    assert SECRET.encode() not in (tmp_path / "mlflow.db").read_bytes()


def test_trackio_local_store(make_recipe, tmp_path):
    """In a process of its own, because trackio reads TRACKIO_DIR when it is imported."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe(**settings("trackio")).to_yaml())
    for more in (["run.steps=3"], []):
        command = ["train", str(recipe), "--resume", "auto", *more]
        done = run_command(*command, TRACKIO_DIR=str(tmp_path / "trackio"))
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    name = json.loads((folder / "trackers.json").read_text())["trackio"]
    (store,) = (tmp_path / "trackio").glob("shapes*.db")
    with sqlite3.connect(store) as tables:
        rows = tables.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert {run for run, _, _ in rows} == {name}
    check({(key, step): v for _, step, text in rows for key, v in json.loads(text).items() if "/" in key}, folder)


def test_a_server_that_never_answers_does_not_keep_the_command(make_recipe, tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe(**settings("mlflow")).to_yaml())
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections wait in its queue
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = run_command("train", str(recipe), MLFLOW_TRACKING_URI=address)
    assert done.returncode == 0, done.stderr
    assert "tracker mlflow: given up" in done.stdout
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_one_that_is_not_installed_is_refused_before_anything_is_written(tracker, make_recipe, monkeypatch, tmp_path):
    monkeypatch.setattr("maskmatch_scale.extras.find_spec", lambda _: None)
    line = rf"record.trackers=\['{tracker}'\]: {tracker} is not installed; pip install 'maskmatch_scale\[{tracker}\]'"
    with pytest.raises(UserError, match=line):
        train(make_recipe(**settings(tracker)))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_name_of_a_library_is_not_the_library(make_recipe, monkeypatch, tmp_path):
    """W&B makes such a folder, from which Python makes an empty package."""
    monkeypatch.setitem(TRACKERS, "wandb", replace(TRACKERS["wandb"], library="folder_of_a_tracker"))
    (tmp_path / "folder_of_a_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="folder_of_a_tracker is not installed"):
        train(make_recipe(**settings("wandb")))


class Stub:
    """A tracker that keeps what it is given. ``gate`` holds back what is sent; flushes raise if ``fails``."""

    known_as = "stub"

    def __init__(self, run, gate=None, *, fails=False):
        self.run, self.gate, self.fails = run, gate, fails
        self.outcome = None

    def send(self, step, figures):
        if self.gate is not None:
            self.gate.wait()

    def flush(self):
        if self.fails:
            raise ConnectionError("server gone")

    def close(self, outcome):
        self.outcome = outcome


@pytest.fixture
def installed(monkeypatch):
    """As if the libraries of all trackers were installed."""
    monkeypatch.setattr("maskmatch_scale.extras.find_spec", lambda _: SimpleNamespace(origin="here"))


@pytest.fixture
def stubs(installed, monkeypatch):
    """Opens a stub in place of every tracker; a function that sets how they are made, with a list of them."""
    made, options = [], {}

    def open_stub(name, run):
        made.append(Stub(run, **options))
        return made[-1]

    monkeypatch.setattr("maskmatch_scale.training.callbacks.trackers._open", open_stub)
    return made, options


def lost_of(folder):
    """How many records the log says did not reach a tracker, and how many there are."""
    log = (folder / "log" / "rank-0.txt").read_text()
    (count,) = re.findall(r"tracker wandb: (\d+) records did not reach it", log)
    return int(count), len((folder / "metrics.jsonl").read_text().splitlines())


def test_one_that_hangs_is_given_up_and_lacks_all(make_recipe, stubs, monkeypatch):
    monkeypatch.setattr("maskmatch_scale.training.callbacks.trackers.CLOSING_S", 0.5)
    gate = stubs[1]["gate"] = threading.Event()
    folder = train(make_recipe(**settings("wandb")))
    assert "tracker wandb: given up" in (folder / "log" / "rank-0.txt").read_text()
    lost, records = lost_of(folder)
    assert lost == records > 5
    gate.set()


def test_one_that_fails_when_it_flushes_lacks_all(make_recipe, stubs):
    stubs[1]["fails"] = True
    lost, records = lost_of(train(make_recipe(**settings("wandb"))))
    assert lost == records > 5


def test_the_error_that_a_caller_handles_is_not_the_runs(make_recipe, stubs):
    recipe = make_recipe(**settings("wandb"))
    try:
        train(recipe, callbacks=[StopAfterTwo])
    except TrainingStopped:
        train(recipe, "auto")
    assert [stub.outcome for stub in stubs[0]] == ["stopped", "finished"]


def test_opened_when_the_loader_processes_are_there(make_recipe, stubs):
    class Watcher(Callback):
        def after_step(self, done, figures):
            (tracker,) = (c for c in self.run.callbacks if isinstance(c, Trackers))
            threads.append(tracker._senders[0]._thread.ident is not None)

    threads = []
    train(make_recipe(**settings("wandb", steps=2)), callbacks=[Watcher])
    assert threads == [False, True]


@pytest.mark.parametrize("content", [b"[]", b'{"wandb": 3}', b'{"wandb": "a', b"\xff"])
def test_damaged_names_are_warned_of_and_begun_anew(content, tmp_path, caplog):
    path = tmp_path / "trackers.json"
    assert _names_in(path) == {}
    assert not caplog.records
    path.write_bytes(content)
    assert _names_in(path) == {}
    (warning,) = caplog.messages
    assert warning.startswith(f"{path} cannot be read")


def test_one_that_breaks_does_not_end_the_run(make_recipe, installed, monkeypatch):
    """The module of a broken installation raises when it is imported."""
    monkeypatch.setitem(sys.modules, "maskmatch_scale.record.trackers.wandb", None)
    folder = train(make_recipe(**settings("wandb")))
    log = (folder / "log" / "rank-0.txt").read_text()
    assert log.count("warning: tracker wandb: ModuleNotFoundError") == 1
    assert "records did not reach it" in log
    assert (folder / "summary.json").is_file()


def test_a_password_in_an_address_reaches_no_tracker(make_recipe, stubs, shapes, tmp_path):
    with FaultyServer(shapes, {}) as server:
        address = server.url.replace("://", f"://me:{SECRET}@")
        data = {"root": address, "cache_dir": str(tmp_path / "cache")}
        train(make_recipe(data=data, **settings("wandb", steps=1)))
    (stub,) = stubs[0]
    assert stub.run.recipe["data"]["root"] == server.url
    assert SECRET not in repr(stub.run)
