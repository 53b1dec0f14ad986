"""The newest checkpoint that is whole is found, or it is told in one line why there is none."""

import json
import shutil

import pytest

from maskmatch_scale.checkpoints.finding import find, find_checkpoint, has_checkpoint, old_teacher, steps_in
from maskmatch_scale.checkpoints.layout import CheckpointError
from tests.checkpoints.made_up import STATE, cut, write

PART = "part-00001-of-00002.safetensors"


@pytest.fixture
def run(tmp_path):
    """A run directory with checkpoints of three steps."""
    for step in (2, 4, 6):
        write(tmp_path / "run" / "checkpoints", step, cut(STATE, {}, 2))
    return tmp_path / "run"


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_what_a_path_means(run):
    checkpoints = run / "checkpoints"
    newest = checkpoints / "step-00000006"
    for where in (run, checkpoints, checkpoints / "latest", newest):
        assert find_checkpoint(where) == newest
    assert find_checkpoint(checkpoints / "step-00000002").name == "step-00000002"
    assert [path.name for path in find(run).older] == ["step-00000004", "step-00000002"]
    assert find(newest).older == ()


def test_a_renamed_checkpoint_is_known_by_its_state(run):
    checkpoints = run / "checkpoints"
    (checkpoints / "step-00000006").rename(checkpoints / "mine")
    assert find(checkpoints / "mine").step == 6
    assert steps_in(checkpoints)[6].name == "mine"
    # `latest` names a folder that is not there: the newest of the others.
    assert find_checkpoint(run).name == "mine"
    shutil.move(checkpoints / "mine", run.parent / "best")
    assert find(run.parent / "best").step == 6


def test_later_ones_of_an_earlier_run_are_not_taken(run):
    """A run that was continued from step 2 has begun another branch."""
    (run / "checkpoints" / "latest").write_text("step-00000004")
    assert find_checkpoint(run).name == "step-00000004"
    flip(run / "checkpoints" / "step-00000004" / PART)
    assert find_checkpoint(run).name == "step-00000002"


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


DAMAGES = {
    "a flipped bit": (lambda folder: flip(folder / PART), "is damaged: its checksum is not that of index.json"),
    "a part cut short": (lambda folder: (folder / PART).write_bytes(b"short"), "has 5 bytes instead of"),
    "a part missing": (lambda folder: (folder / PART).unlink(), f"{PART} is missing"),
    "no index": (lambda folder: (folder / "index.json").unlink(), "index.json is missing"),
    "an empty index": (lambda folder: (folder / "index.json").write_bytes(b""), "index.json cannot be read"),
    "another index": (lambda folder: edit(folder / "index.json", "[4, 6]", "[3, 8]"), "index.json is not as it was"),
    "no state": (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
    "another state": (lambda folder: edit(folder / "state.json", "6", "7"), "state.json is damaged"),
    "no stream": (lambda folder: (folder / "stream.json").unlink(), "stream.json is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_and_the_one_before_is_taken(run, name):
    spoil, message = DAMAGES[name]
    newest = run / "checkpoints" / "step-00000006"
    spoil(newest)
    assert find_checkpoint(run).name == "step-00000004"
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")) as error:  # it was named itself
        find_checkpoint(newest)
    assert str(newest) in str(error.value)
    assert "\n" not in str(error.value)
    assert "continue from another checkpoint" in str(error.value)


def test_the_lines_of_what_was_passed_over(run):
    checkpoints = run / "checkpoints"
    (checkpoints / "step-00000006" / PART).unlink()
    found = find(run)
    assert found.step == 4
    assert found.passed_over == (f"{checkpoints / 'step-00000006'}: {PART} is missing",)
    before = found.instead("a reason")
    assert before.step == 2
    assert before.passed_over == (*found.passed_over, f"{checkpoints / 'step-00000004'}: a reason")
    with pytest.raises(
        CheckpointError, match=r"step-00000006: .*; .*step-00000004: a reason; .*step-00000002: another"
    ):
        before.instead("another")


def test_sizes_alone_are_quick_and_do_not_see_everything(run):
    flip(run / "checkpoints" / "step-00000006" / PART)
    assert find_checkpoint(run, verify=False).name == "step-00000006"


def test_foreign_and_empty_folders(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    for where in ("empty", "foreign", "nowhere", "foreign/config.json"):
        assert not has_checkpoint(tmp_path / where)
        with pytest.raises(CheckpointError, match=f"{where}: there is no complete checkpoint here"):
            find(tmp_path / where)


def test_a_future_format(run):
    index = run / "checkpoints" / "step-00000006" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 7}))
    for where in (run, index.parent):  # an older one is not taken in silence
        with pytest.raises(CheckpointError, match="it has format 7, this version reads format 1"):
            find(where)


@pytest.fixture
def old_run(tmp_path):
    """What versions before format 1 have left."""
    folder = tmp_path / "old" / "checkpoints" / "step-00000002"
    (folder / "engine").mkdir(parents=True)
    (folder / "ema.safetensors").write_bytes(b"")
    (folder / "state.json").write_text(json.dumps({"step": 2, "world_size": 1}))
    (folder.parent / "latest").write_text(folder.name)
    return tmp_path / "old"


def test_a_checkpoint_of_an_older_version(old_run):
    folder = old_run / "checkpoints" / "step-00000002"
    for where in (old_run, folder):
        with pytest.raises(
            CheckpointError, match=r"before checkpoints had a format.*model\.pretrained=.*step-00000002"
        ):
            find(where)
        assert old_teacher(where) == folder / "ema.safetensors"


def test_new_ones_have_no_old_teacher(run):
    assert old_teacher(run) is None
    assert old_teacher(run / "checkpoints" / "step-00000006") is None
