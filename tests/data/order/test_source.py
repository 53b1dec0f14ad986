"""What decides whether a source goes on with its epoch: its digest; and orders that the processes of a node share."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from maskmatch_scale.data import node_arrays
from maskmatch_scale.data.order import epoch
from maskmatch_scale.data.order.queue import SamplePlace
from maskmatch_scale.data.order.sequential import Deal, SequentialSource
from maskmatch_scale.data.order.source import WeightedSource
from maskmatch_scale.data.shards.index import ShardTable
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.recipe import DataRecipe
from maskmatch_scale.recipe.where import Where
from tests.data.remote.common import in_processes

EPOCHS = 12


def weighted(numbers=None):
    rows = [
        {"file": f"x-{n}.tar", "samples": 3 + n % 4, **({"sha256": f"{n:064x}"} if n % 2 else {"bytes": 1000 + n})}
        for n in range(7)
    ]
    table = ShardTable(rows)
    stream = SimpleNamespace(shards=table, root="/data", identities=table.identities, arrays=None)
    return WeightedSource(stream, "mine", 5, 4, numbers=numbers)


def sequential(where=None):
    shards = [f"https://user:pw@example.org/{n}.tar?sig=1" for n in range(5)]
    return SequentialSource(shards, "far", 5, 64, None, Deal(2, 2), where=where)


def test_with_all_samples_digests_and_orders_stay_what_they_were():
    """The values are those of the version before `part`, `shards` and `where`."""
    source = weighted()
    assert source.info.content == "73febf59200f12f1"
    first = [(6, 0), (6, 1), (6, 2), (6, 3), (6, 4), (4, 2), (4, 0), (4, 1), (0, 0), (0, 1), (5, 0), (0, 2)]
    assert [source.locate(SamplePlace(1, 2, place)) for place in range(12)] == first
    drawn = weighted(np.array([0, 3, 4, 9, 20]))
    assert drawn.info.content == "65efccaa11ce8b83"
    located = [drawn.locate(SamplePlace(1, 2, place)) for place in range(5)]
    assert located == [(4, 2), (0, 0), (1, 0), (2, 2), (1, 1)]
    assert sequential().info.content == "450794129fcab783"


@pytest.mark.parametrize(("one", "other", "same"), [("a>1", "(a > 1)", True), ("a > 1", "a > 2", False)])
def test_another_condition_is_another_content(one, other, same):
    contents = [sequential(Where(text)).info.content for text in (one, other)]
    assert (contents[0] == contents[1]) is same
    assert sequential().info.content not in contents


@pytest.fixture
def open_source(shapes, tmp_path, monkeypatch):
    """Makes a source of eight shards, for which eight are many."""
    monkeypatch.setattr(epoch, "LARGE", 8)

    def make(*, share=True, name="x", seed=3):
        stream = ShardStream(shapes, "unlabelled", DataRecipe(root=str(shapes), cache_dir=str(tmp_path)))
        if not share:
            stream.arrays = None
        return WeightedSource(stream, name, seed, 4)

    return make


def places(source, number, lanes=2):
    order = source.order(number, lanes)
    return [order[place] for place in range(len(order))]


def test_orders_are_mapped_and_the_same(open_source, tmp_path):
    shared, alone = open_source(), open_source(share=False)
    for number in range(EPOCHS):
        assert places(shared, number) == places(alone, number)
        assert isinstance(shared.order(number, 2).starts, node_arrays._Mapped)
    assert places(shared, 0, lanes=3) == places(alone, 0, lanes=3)
    assert not isinstance(alone.order(0, 2).starts, node_arrays._Mapped)
    assert shared.info == alone.info
    for other in ({"name": "y"}, {"seed": 4}):
        assert places(open_source(**other), 0) == places(open_source(share=False, **other), 0)
        assert places(open_source(**other), 0) != places(alone, 0)


def test_those_of_past_epochs_are_removed(open_source, tmp_path):
    source = open_source()
    for number in range(EPOCHS):
        source.order(number, 1)
    (folder,) = tmp_path.glob("arrays-*")
    names = [path.name for path in folder.iterdir()]
    assert len(names) == epoch._FILES_OF_A_SOURCE < EPOCHS
    assert all(re.fullmatch(r"order1-[0-9a-f]{32}-[0-9a-f]{16}\.safetensors", name) for name in names)
    source.order(EPOCHS - 1, 3)  # other lanes: the same file
    assert len(names) == len(list(folder.iterdir()))


def test_sources_of_equal_sizes_keep_their_orders(open_source, tmp_path):
    """All of them are needed at a time, however many there are."""
    sources = [open_source(name=f"s{number}") for number in range(epoch._FILES_OF_A_SOURCE + 1)]
    for source in sources:
        source.order(0, 1)
    (folder,) = tmp_path.glob("arrays-*")
    assert len(list(folder.iterdir())) == len(sources)


def test_one_process_makes_an_order_for_all(open_source, monkeypatch):
    source = open_source()
    expected = places(open_source(share=False), 5)
    source.order(5, 2)
    monkeypatch.setattr(epoch, "permutation", lambda *_: pytest.fail("it is there already"))

    def work(_number):
        # Of a window the order is not shared: it is small.
        assert open_source().order(5, 2).shards.tolist() == source.order(5, 2).shards.tolist()

    assert in_processes(2, work) == [0, 0]
    monkeypatch.undo()
    assert places(source, 5) == expected


def test_small_orders_are_not_written(open_source, tmp_path, monkeypatch):
    monkeypatch.setattr(epoch, "LARGE", 9)
    open_source().order(0, 1)
    assert not list(tmp_path.glob("arrays*"))
