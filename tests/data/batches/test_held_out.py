"""Each image counts once."""

import pytest

from maskmatch_scale.data.batches.held_out import evaluation_samples
from maskmatch_scale.data.faults import DataError


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_shows_each_sample_once(make_recipe, world_size):
    data = make_recipe().data
    ranks = [[s.key for s in evaluation_samples(data, "val", rank, world_size)] for rank in range(world_size)]
    assert sorted(key for keys in ranks for key in keys) == [f"val-{number:04d}" for number in range(5)]
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    with pytest.raises(DataError, match="no labels"):
        list(evaluation_samples(data, "unlabelled"))
