"""What decides whether a source goes on with its epoch: its digest. Runs of older versions must be able to go on."""

from types import SimpleNamespace

import numpy as np
import pytest

from maskmatch_scale.data.order.queue import SamplePlace
from maskmatch_scale.data.order.sequential import Deal, SequentialSource
from maskmatch_scale.data.order.source import WeightedSource
from maskmatch_scale.data.shards.index import ShardTable
from maskmatch_scale.recipe.where import Where


def weighted(numbers=None):
    rows = [
        {"file": f"x-{n}.tar", "samples": 3 + n % 4, **({"sha256": f"{n:064x}"} if n % 2 else {"bytes": 1000 + n})}
        for n in range(7)
    ]
    table = ShardTable(rows)
    stream = SimpleNamespace(shards=table, root="/data", identities=table.identities)
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
