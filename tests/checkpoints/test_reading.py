"""Whatever way a state was cut into pieces, every slice of it is read as it was."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from maskmatch_scale.checkpoints.index import DamagedError, read_index
from maskmatch_scale.checkpoints.reading import StoredTensors, Weights, being_read, unless_read
from tests.checkpoints.made_up import STATE, cut, read_all, same, write


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_division_is_read_in_any_slice(data):
    ranks = data.draw(st.integers(1, 4))
    cuts = {name: data.draw(st.lists(st.integers(0, value.numel()), max_size=4)) for name, value in STATE.items()}
    with tempfile.TemporaryDirectory() as folder:
        outcome = write(Path(folder), pieces=cut(STATE, cuts, ranks))
        assert outcome.error is None
        stored = StoredTensors(outcome.folder)
        assert same(read_all(stored), STATE)
        for name, value in STATE.items():
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, value.numel())] * 2)))
            assert stored.read(name, start, stop).equal(value.flatten()[start:stop])


def test_the_parts_are_safetensors(tmp_path):
    outcome = write(tmp_path, pieces=cut(STATE, {"student/backbone.weight": [10]}, 2))
    read = {}
    for part in sorted(outcome.folder.glob("*.safetensors")):
        read |= load_file(part)
    assert read["student/backbone.weight:10"].equal(torch.arange(10.0, 24.0))
    assert read["student/head.bias:0"].dtype == torch.bfloat16
    assert len(read) == 6  # five tensors, one of them in two pieces; one has no elements


def test_only_the_bytes_of_a_slice_are_read(tmp_path, monkeypatch):
    outcome = write(tmp_path, pieces=cut(STATE, {}, 1))
    stored = StoredTensors(outcome.folder)
    stored.read("ema/backbone.weight")  # with it the header
    asked = []
    import os

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, into, place: asked.append(len(into[0])) or preadv(file, into, place))
    assert stored.read("ema/backbone.weight", 5, 8).tolist() == [2.5, 3.0, 3.5]
    assert asked == [12]


def test_what_is_not_there(tmp_path):
    stored = StoredTensors(write(tmp_path).folder)
    for ask in (stored.read, stored.shape, stored.dtype):
        with pytest.raises(KeyError):
            ask("student/nowhere")
    with pytest.raises(IndexError):
        stored.read("student/head.bias", 0, 4)


def test_a_file_that_was_cut_short_is_an_error(tmp_path):
    folder = write(tmp_path).folder
    stored = StoredTensors(folder)
    stored.read("ema/head.bias")
    part = folder / "part-00000-of-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-40])
    with pytest.raises(OSError, match="ends too early"):
        read_all(stored)


def test_weights_have_the_segmenters_names(tmp_path):
    weights = Weights(StoredTensors(write(tmp_path).folder), "ema")
    assert set(weights) == {"backbone.weight", "head.bias", "nothing"}
    assert weights.shape("backbone.weight") == (4, 6)
    assert weights.dtype("head.bias") == torch.float32
    assert weights["backbone.weight"].equal(STATE["ema/backbone.weight"])
    assert "student/head.bias" not in weights


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[:-9], "cannot be read"),
        (lambda text: text.replace("[4, 6]", "[6, 4]"), "not as it was written"),
        (lambda text: "[]", "cannot be read"),
    ],
)
def test_a_damaged_index_is_told(tmp_path, spoil, message):
    folder = write(tmp_path).folder
    text = (folder / "index.json").read_text()
    assert spoil(text) != text
    (folder / "index.json").write_text(spoil(text))
    with pytest.raises(DamagedError, match=message):
        read_index(folder)


def test_readers_keep_a_checkpoint(tmp_path):
    folder = write(tmp_path).folder
    with being_read(folder), being_read(folder), unless_read(folder) as free:
        assert not free
    with unless_read(folder) as free:
        assert free
