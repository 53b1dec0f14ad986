"""An evaluation whose images are decoded ahead: the same figures, and no process after it."""

import multiprocessing
from functools import partial

import pytest
import torch

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.evaluation.evaluate import evaluate_split
from maskmatch_scale.evaluation.inference import Inference
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.recipe import DataRecipe, EvaluationRecipe
from tests.conftest import ShapesSource, rewrite_shard, write_shards

HOW = Inference(EvaluationRecipe(), (64, 64), 1, 1, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), torch.device("cpu"))


def segmenter(images):
    """Three classes by brightness and colour."""
    return torch.cat([images[:, :2] * 3, images[:, :1] - images[:, 1:2]], 1)


def _note_children(seen):
    seen.append(children())


def children():
    return len(multiprocessing.active_children())


@pytest.mark.parametrize(("place", "own"), [((0, 1), 5), ((0, 2), 3), ((1, 2), 2)])
def test_decoding_ahead_changes_no_count(shapes, place, own):
    counts = []
    before = children()
    for workers in (0, 1, 2):
        matrix, during = ConfusionMatrix(3), []
        data = DataRecipe(root=str(shapes), workers=workers)
        count = partial(_note_children, during)
        evaluate_split(segmenter, data, "val", HOW, matrix, place, progress=count)
        assert during[0] - before == min(workers, own - 1)
        counts.append(matrix.counts)
    assert counts[0].equal(counts[1])
    assert counts[0].equal(counts[2])
    assert children() == before


def test_an_error_ends_the_processes_too(shapes):
    before = children()

    def broken(images):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory") as caught:
        evaluate_split(broken, DataRecipe(root=str(shapes), workers=2), "val", HOW, ConfusionMatrix(3))
    assert children() == before, caught  # while the traceback is still held


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_is_named_on_one_line(tmp_path, workers):
    write_shards(ShapesSource({"labelled": 2, "unlabelled": 2, "val": 5}), tmp_path, workers=1, progress=False)
    shards = ShardIndex.load(tmp_path).streams["val"].shards
    shard = shards.file(shards.locate(3)[0])
    rewrite_shard(tmp_path, shard, {"val-0003.png": b"no label"})
    with pytest.raises(DataError) as caught:
        evaluate_split(segmenter, DataRecipe(root=str(tmp_path), workers=workers), "val", HOW, ConfusionMatrix(3))
    assert str(caught.value).startswith(f"{shard}: val-0003: not a readable label map")
    assert "\n" not in str(caught.value)
