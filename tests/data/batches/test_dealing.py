"""How many lanes there are, whose they are, and mixes that would not read some of them."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskmatch_scale.data.batches import training
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.data.faults import DataError
from tests.conftest import recipe_maker
from tests.data.batches.archive import make, sequential, taken, write_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("archive"))


def test_lanes_that_would_never_be_read_are_refused(make_recipe, shapes, archive):
    """One image a batch, of two sources in turn: all even batches are of one source."""
    turns = [{"root": str(shapes)}, sequential(archive)]
    with pytest.raises(DataError, match=r"'archive': .*1 of the 2 lanes .* of rank 0 would never be read"):
        make(make_recipe, archive, source=turns, micro_batch=1, sequential_lanes=2)
    made = make(make_recipe, archive, source=turns, micro_batch=1, sequential_lanes=3)
    assert len({lane for batch in taken(made, 0, 12) for _, lane, _ in batch.lanes}) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_turns_is_refused_on_all_ranks(make_recipe, shapes, archive, rank):
    """Two ranks that share a lane of the mix: all even images are of one source, and of one rank."""
    turns = [{"root": str(shapes)}, sequential(archive)]
    with pytest.raises(DataError, match=r"'archive': .*1 of the 1 lanes .* of rank 1 would never be read"):
        make(make_recipe, archive, rank, 2, source=turns, micro_batch=1, lanes=1)


@given(
    weights=st.lists(st.sampled_from([1, 2, 3, 0.7, 0.15]), min_size=1, max_size=3),
    layout=st.sampled_from([(1, 1, 1), (1, 3, 1), (2, 1, 1), (2, 2, 2), (2, 2, 4), (2, 3, 3)]),
    each=st.integers(1, 4),
    accumulation=st.integers(1, 2),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mixes_are_refused_that_do_not_read_a_lane(shapes, archive, tmp_path, weights, layout, each, accumulation):
    """Against the batches themselves."""
    world_size, micro_batch, lanes = layout
    mixed = [{"root": str(shapes), "name": f"n{n}", "weight": weight} for n, weight in enumerate(weights)]
    mixed.insert(len(weights) // 2, sequential(archive))
    data = {"unlabelled": mixed, "lanes": lanes, "sequential_lanes": each * world_size}
    recipe = recipe_maker(shapes, tmp_path)(
        data=data, engine={"micro_batch": micro_batch, "accumulation": accumulation}, method={"burn_in": 0}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "check_turns", lambda *_: None)
        ranks = [TrainingBatches(recipe, 3, rank, world_size, unlabelled=True) for rank in range(world_size)]
    had = {
        rank.rank * each + number % each
        for rank in ranks
        for number in range(400 * each)
        for source, _ in rank._turns(rank.unlabelled, number)
        if source.name == "archive"
    }
    if len(had) == each * world_size:
        ranks[0]._check_lanes()
    else:
        with pytest.raises(DataError, match="would never be read"):
            ranks[0]._check_lanes()


def test_other_ranks_must_divide_the_lanes_of_before(make_recipe, archive):
    first = make(make_recipe, archive, workers=3)
    state = first.state(0) | {"ranks": [first.own_state()]}
    with pytest.raises(DataError, match=r"the 3 lanes that the run has had: 2 ranks × 1 loader .*multiple of 2: then"):
        make(make_recipe, archive, 0, 2, workers=1).resume(state)
