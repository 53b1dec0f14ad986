"""Loader processes change no batch, and hand errors over in one line."""

import pytest

from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.faults import DataError
from tests.data.batches.common import make_batches, same


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_restarts_change_nothing(make_recipe, workers):
    plain = list(load_batches(make_batches(make_recipe), 0, 6))
    loaded = list(load_batches(make_batches(make_recipe, data={"workers": workers}), 0, 6))
    continued = list(load_batches(make_batches(make_recipe, data={"workers": workers}), 4, 6))
    assert all(map(same, plain, loaded))
    assert all(map(same, plain[4:], continued))


def test_a_batch_stays_as_it_is_when_later_ones_are_loaded(make_recipe):
    """Loader processes hand batches over in slots that they use again."""
    plain = list(load_batches(make_batches(make_recipe), 0, 24))
    kept = []
    for batch in load_batches(make_batches(make_recipe, data={"workers": 2}), 0, 24):
        kept.append(batch)
    assert all(map(same, plain, kept))


def test_a_batch_is_made_in_memory_that_is_given(make_recipe):
    made = make_batches(make_recipe, method={"burn_in": 0.5}, run={"steps": 8})
    memory = made.largest_batch()
    for number in (6, 0, 7):  # with unlabelled images, and without
        batch = made.make(number, memory)
        assert same(batch, made[number])
        assert [part.data_ptr() for part in batch.tensors if len(part)] == [
            whole.data_ptr() for part, whole in zip(batch.tensors, memory.tensors, strict=True) if len(part)
        ]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_labelled_sample_is_one_line_also_from_a_worker(make_recipe, spoilt, workers):
    bad = make_batches(make_recipe, data={"root": str(spoilt), "workers": workers})
    with pytest.raises(DataError, match="labelled-0000") as caught:
        list(load_batches(bad, 0, 8))
    assert "\n" not in str(caught.value)
