"""Figures wait on the device until a flush, whatever each step has of them."""

import json

import torch

from maskmatch_scale.record.metrics import MetricsLog


def test_steps_with_different_figures_in_one_flush(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", print)
    # The burn-in ends between two flushes.
    log.train(1, {"lr": 0.1, "loss_u": None}, {"loss": torch.tensor(2.0)})
    log.train(2, {"lr": 0.2, "loss_u": None}, {"loss": torch.tensor(1.5), "loss_u": torch.tensor(0.5)})
    assert not (tmp_path / "metrics.jsonl").exists()
    records = log.flush()
    assert log.flush() == []
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == records
    assert lines[0] == {"step": 1, "kind": "train", "lr": 0.1, "loss_u": None, "loss": 2.0}
    assert lines[1] == {"step": 2, "kind": "train", "lr": 0.2, "loss_u": 0.5, "loss": 1.5}


def test_waiting_records_come_before_one_written_at_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", print)
    log.train(1, {}, {"loss": torch.tensor(float("nan"))})
    log.write({"step": 1, "kind": "eval", "miou": 0.5})
    train, evaluation = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert train == {"step": 1, "kind": "train", "loss": None}
    assert evaluation["kind"] == "eval"


def test_other_ranks_read_but_do_not_write(tmp_path):
    log = MetricsLog(None, print)
    log.train(1, {}, {"loss": torch.tensor(1.0)})
    assert log.flush() == [{"step": 1, "kind": "train", "loss": 1.0}]


def test_readers_are_given_what_is_written_in_its_order(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", print)
    read = []
    log.readers.append(read.extend)
    log.train(1, {"lr": 0.1}, {"loss": torch.tensor(float("nan"))})
    log.add({"step": 1, "kind": "checkpoint", "bytes": 5})
    log.write({"step": 1, "kind": "eval", "miou": 0.5})
    assert read == [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in read] == ["checkpoint", "train", "eval"]
    silent = MetricsLog(None, print)  # a rank that does not write
    silent.readers.append(read.clear)
    silent.add({"step": 1, "kind": "checkpoint"})
    assert len(read) == 3
