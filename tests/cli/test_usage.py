"""A command line that cannot be: one line, with an example, and exit code 2."""

import numpy as np
import pytest
from PIL import Image


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("shards write voc VOC2012", "shards write voc: missing argument 'OUT' (example: maskmatch shards write voc V"),
        ("shards write folder a b --clases c", "no such option: --clases (Possible options: --classes"),
        ("shards write folder a b --workers x", "invalid value for '--workers'"),
        ("shards wrte", "shards: no such command 'wrte'. Did you mean 'write'?"),
        ("trian r.yaml", "error: no such command 'trian'. Did you mean 'train'? (example: maskmatch train "),
        ("predict runs/x photos", "predict: missing option '--out' (example: maskmatch predict"),
        ("shards write vco VOC2012 out", "unknown source 'vco'; there are: "),
    ],
)
def test_one_line(maskmatch, words, said):
    code, out, err = maskmatch(*words.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert ". On " not in err  # of several examples the first one


def test_a_group_alone_prints_its_help(maskmatch):
    code, out, err = maskmatch("shards", "write")
    assert (code, err) == (2, "")
    assert "folder" in out


def test_other_ranks_are_silent(maskmatch, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("MASKMATCH_EXIT_CODE_FILE", str(tmp_path / "code"))
    assert maskmatch("train", "--nothing") == (2, "", "")
    assert (tmp_path / "code").read_text() == "2\n"


def test_what_to_do_next_is_said(maskmatch, shapes, tmp_path):
    code, _, err = maskmatch("shards", "index", shapes / "unlabelled-000000.tar", tmp_path / "my out", "--workers", 1)
    assert code == 0
    assert f"maskmatch shards verify '{tmp_path}/my out'\n" in err
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "photos" / "a.jpg")
    code, _, err = maskmatch("shards", "write", "folder", tmp_path / "photos", tmp_path / "out", "--workers", 1)
    assert code == 0
    assert f"maskmatch shards show {tmp_path}/out\n" in err
