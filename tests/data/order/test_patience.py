"""The time that may be spent on shards that do not come ends, however many of them there are."""

import math

import pytest

from maskmatch_scale.data.order.patience import Patience


@pytest.mark.parametrize("limit_s", [0.1, 450.0])
def test_shards_that_use_up_all_they_may(limit_s):
    patience, spent, asked = Patience(limit_s), 0.0, 0
    while not patience.is_lost:
        spent += patience.for_a_shard_s
        patience.waited(patience.for_a_shard_s)
        asked += 1
    assert asked > 3  # one dead shard is no outage
    assert spent <= limit_s
    assert patience.for_a_shard_s == 0
    patience.recover()
    assert patience.for_a_shard_s == limit_s / 2
    assert not patience.is_lost


def test_without_a_limit():
    patience = Patience()
    patience.waited(1e9)
    assert patience.for_a_shard_s == math.inf
    assert not patience.is_lost
