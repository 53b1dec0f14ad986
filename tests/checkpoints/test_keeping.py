"""Which checkpoints are deleted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskmatch_scale.checkpoints.finding import find_checkpoint, steps_in
from maskmatch_scale.checkpoints.keeping import Keep, Keeper, best_of, kept
from maskmatch_scale.checkpoints.reading import being_read
from tests.checkpoints.made_up import write


@given(
    st.sets(st.integers(0, 60), min_size=1),
    st.dictionaries(st.integers(0, 60), st.floats(0, 1)),
    st.builds(Keep, st.integers(0, 4), st.integers(0, 7), st.integers(0, 3)),
    st.data(),
)
def test_what_is_kept(steps, scores, keep, data):
    newest = data.draw(st.sampled_from(sorted(steps)))
    found = kept(steps, newest, scores, keep)
    before = sorted(step for step in steps if step <= newest)
    assert newest in found
    assert found <= steps
    assert {step for step in steps if step > newest} <= found
    assert keep.last == 0 or set(before[-keep.last :]) <= found
    assert not keep.every or {step for step in before if step % keep.every == 0} <= found
    best = sorted((step for step in before if step in scores), key=lambda step: (-scores[step], step))[: keep.best]
    assert set(best) <= found
    others = found - {newest} - {step for step in steps if step > newest} - set(best)
    assert all(step in before[-keep.last :] if keep.last else False for step in others if not _of(step, keep.every))


def _of(step, every):
    return bool(every and step % every == 0)


def test_of_equal_scores_the_earlier_is_better():
    assert best_of({1: 0.5, 2: 0.7, 3: 0.7}, 2) == [2, 3]


def run_of(folder, keep, scores, start=0):
    """Steps start + 1, …: a checkpoint of each step that `keep` asks for."""
    keeper = Keeper(folder, keep, start, writes=True)
    for step, miou in scores.items():
        write(folder, step, completed=keeper.tidy)
        keeper.scored(step, miou)
    keeper.tidy(max(scores))
    return keeper


def test_the_best_is_kept_and_named(tmp_path):
    run_of(tmp_path, Keep(1, 0, 1), {1: 0.2, 2: 0.6, 3: 0.4, 4: 0.5})
    assert steps_in(tmp_path).keys() == {2, 4}
    assert (tmp_path / "best").read_text() == "step-00000002 0.6\n"
    assert find_checkpoint(tmp_path / "best").name == "step-00000002"
    assert find_checkpoint(tmp_path).name == "step-00000004"
    # A run that continues knows the best of the time before.
    run_of(tmp_path, Keep(1, 0, 1), {5: 0.55, 6: 0.3}, start=4)
    assert steps_in(tmp_path).keys() == {2, 6}


def test_scores_after_the_step_that_a_run_continues_from_do_not_count(tmp_path):
    run_of(tmp_path, Keep(3, 0, 1), {1: 0.2, 2: 0.3, 3: 0.9})
    keeper = Keeper(tmp_path, Keep(3, 0, 1), 2, writes=True)
    keeper.scored(4, 0.1)
    assert keeper.is_best(4)


def test_a_checkpoint_that_could_not_be_written_is_not_the_best(tmp_path):
    keeper = run_of(tmp_path, Keep(1, 0, 1), {1: 0.6, 2: 0.4})
    keeper.scored(3, 0.9)
    # Until it is written the one before is named too.
    assert (tmp_path / "best").read_text() == "step-00000003 0.9\nstep-00000001 0.6\n"
    assert find_checkpoint(tmp_path / "best").name == "step-00000001"
    keeper.lost(3)
    assert (tmp_path / "best").read_text() == "step-00000001 0.6\n"
    assert keeper.is_best(1)


def test_other_ranks_know_the_best_and_write_nothing(tmp_path):
    keeper = Keeper(tmp_path, Keep(1, 0, 1), 0, writes=False)
    keeper.scored(1, 0.5)
    assert keeper.is_best(1)
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_is_deleted_later(tmp_path):
    keeper = run_of(tmp_path, Keep(1, 0, 0), {1: 0.0})
    with being_read(tmp_path / "step-00000001"):
        write(tmp_path, 2, completed=keeper.tidy)
        assert steps_in(tmp_path).keys() == {1, 2}
    write(tmp_path, 3, completed=keeper.tidy)
    assert steps_in(tmp_path).keys() == {3}


@pytest.mark.parametrize("line", ["", "rubbish", "step-00000001", "step-00000001 much", "step-00000001 0.5 0.6"])
def test_a_spoilt_list_of_the_best_is_passed_over(tmp_path, line):
    (tmp_path / "best").write_text(f"{line}\nstep-00000002 0.25\n")
    keeper = Keeper(tmp_path, Keep(1, 0, 1), 5, writes=True)
    assert keeper.is_best(2)
