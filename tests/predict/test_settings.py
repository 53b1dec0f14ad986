"""`predict.json`, which several ranks may be the first to write."""

import json
import os

import pytest

from maskmatch_scale.errors import UserError
from maskmatch_scale.files import file_whole
from maskmatch_scale.predict.settings import claim


def test_what_another_rank_is_writing_does_not_make_the_folder_a_foreign_one(tmp_path):
    with file_whole(tmp_path / "predict.json") as beside:
        beside.write_text("half")
        claim(tmp_path, {"step": 4}, overwrite=False, first_rank=False)
    (tmp_path / "predict.json").unlink()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="has files, but none of `maskmatch predict`"):
        claim(tmp_path, {"step": 4}, overwrite=False, first_rank=True)


def test_processes_of_equal_numbers_write_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)  # as in two containers
    with file_whole(tmp_path / "x") as one, file_whole(tmp_path / "x") as other:
        assert one != other
        one.write_text("1")
        other.write_text("2")


def test_a_renamed_model_is_the_same_model(tmp_path):
    claim(tmp_path, {"model": "mine", "fingerprint": "f0"}, overwrite=False, first_rank=True)
    claim(tmp_path, {"model": "ours", "fingerprint": "f0"}, overwrite=False, first_rank=True)
    with pytest.raises(UserError, match='made with fingerprint = "f0"'):
        claim(tmp_path, {"model": "mine", "fingerprint": "f1"}, overwrite=False, first_rank=True)
    assert json.loads((tmp_path / "predict.json").read_text())["model"] == "mine"
