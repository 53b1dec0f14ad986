"""Which checkpoints are deleted."""

import shutil
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskmatch_scale.checkpoints import finding, keeping
from maskmatch_scale.checkpoints.finding import find, opened, steps_in
from maskmatch_scale.checkpoints.keeping import Keep, Keeper, best_of, kept
from maskmatch_scale.checkpoints.reading import being_read
from tests.checkpoints.made_up import write


@given(
    st.sets(st.integers(0, 60), min_size=1),
    st.dictionaries(st.integers(0, 60), st.floats(0, 1)),
    st.builds(Keep, st.integers(0, 4), st.integers(0, 7), st.integers(0, 3)),
)
def test_what_is_kept(steps, scores, keep):
    found = kept(steps, scores, keep)
    assert max(steps) in found
    assert found <= steps
    last = sorted(steps)[-keep.last :] if keep.last else []
    assert set(last) <= found
    assert not keep.every or {step for step in steps if step % keep.every == 0} <= found
    best = sorted((step for step in steps if step in scores), key=lambda step: (-scores[step], step))[: keep.best]
    assert set(best) <= found
    others = found - {max(steps)} - set(best)
    assert all(step in last for step in others if not _of(step, keep.every))


def _of(step, every):
    return bool(every and step % every == 0)


def test_of_equal_scores_the_earlier_is_better():
    assert best_of({1: 0.5, 2: 0.7, 3: 0.7}, 2) == [2, 3]


def run_of(folder, keep, scores, start=0):
    """Steps start + 1, …: a checkpoint of each step that `keep` asks for."""
    keeper = Keeper(folder, keep, start)
    for step, miou in scores.items():
        write(folder, step, completed=keeper.tidy)
        keeper.scored(step, miou)
    keeper.tidy(max(scores))
    return keeper


def test_the_best_is_kept_and_named(tmp_path):
    run_of(tmp_path, Keep(1, 0, 1), {1: 0.2, 2: 0.6, 3: 0.4, 4: 0.5})
    assert steps_in(tmp_path).keys() == {2, 4}
    assert (tmp_path / "best").read_text() == "step-00000002 0.6\n"
    assert find(tmp_path / "best").folder.name == "step-00000002"
    assert find(tmp_path).folder.name == "step-00000004"
    # A run that continues knows the best of the time before.
    run_of(tmp_path, Keep(1, 0, 1), {5: 0.55, 6: 0.3}, start=4)
    assert steps_in(tmp_path).keys() == {2, 6}


def test_the_best_is_named_before_there_is_a_checkpoint(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    Keeper(folder, Keep(1, 0, 1), 0).scored(1, 0.25)
    assert (folder / "best").read_text() == "step-00000001 0.25\n"
    assert caplog.records == []


def test_scores_after_the_step_that_a_run_continues_from_do_not_count(tmp_path):
    run_of(tmp_path, Keep(3, 0, 1), {1: 0.2, 2: 0.3, 3: 0.9})
    keeper = Keeper(tmp_path, Keep(3, 0, 1), 2)
    keeper.scored(4, 0.1)
    assert keeper.is_best(4)


def test_a_checkpoint_that_could_not_be_written_is_not_the_best(tmp_path):
    keeper = run_of(tmp_path, Keep(1, 0, 1), {1: 0.6, 2: 0.4})
    keeper.scored(3, 0.9)
    # Until it is written the one before is named too.
    assert (tmp_path / "best").read_text() == "step-00000003 0.9\nstep-00000001 0.6\n"
    assert find(tmp_path / "best").folder.name == "step-00000001"
    keeper.lost(3)
    assert (tmp_path / "best").read_text() == "step-00000001 0.6\n"
    assert keeper.is_best(1)


@pytest.mark.parametrize("every", [0, 4])
def test_those_that_are_not_of_the_run_cost_no_other_and_go(tmp_path, every):
    """Step 4 is damaged, or of a run that went another way; this one goes on from step 1."""
    for step in (1, 4, 9):
        write(tmp_path, step)
    keeper = Keeper(tmp_path, Keep(2, every, 0), 1)
    write(tmp_path, 3, completed=keeper.tidy)
    assert steps_in(tmp_path).keys() == {1, 3, 4, 9}
    write(tmp_path, 5, completed=keeper.tidy)
    assert steps_in(tmp_path).keys() == {3, 5, 9}
    assert [path.name for path in find(tmp_path).older] == ["step-00000003"]


def test_one_that_is_not_of_the_run_is_not_the_best(tmp_path):
    for step in (1, 4):
        write(tmp_path, step)
    keeper = Keeper(tmp_path, Keep(2, 0, 1), 1)
    keeper.scored(1, 0.2)
    keeper.scored(4, 0.3)  # which is not written again
    keeper.scored(6, 0.5)
    assert (tmp_path / "best").read_text() == "step-00000006 0.5\nstep-00000001 0.2\n"


def test_a_score_does_not_wait_while_files_are_deleted(tmp_path, monkeypatch):
    keeper = run_of(tmp_path, Keep(1, 0, 1), {1: 0.5})
    write(tmp_path, 2)
    write(tmp_path, 3)
    begun, go, rmtree = threading.Event(), threading.Event(), shutil.rmtree

    def slow(path):
        begun.set()
        assert go.wait(60)
        rmtree(path)

    monkeypatch.setattr(keeping.shutil, "rmtree", slow)
    keeper.scored(2, 0.4)
    deleting = threading.Thread(target=lambda: [keeper.tidy(2), keeper.tidy(3)])
    deleting.start()
    assert begun.wait(60)
    scoring = threading.Thread(target=keeper.scored, args=(3, 0.6))
    scoring.start()
    scoring.join(10)
    waited = scoring.is_alive()
    go.set()
    deleting.join()
    assert not waited
    assert (tmp_path / "best").read_text().startswith("step-00000003 0.6\n")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_what_is_read_is_deleted_later(tmp_path):
    keeper = run_of(tmp_path, Keep(1, 0, 0), {1: 0.0})
    with being_read(tmp_path / "step-00000001"):
        write(tmp_path, 2, completed=keeper.tidy)
        assert steps_in(tmp_path).keys() == {1, 2}
    write(tmp_path, 3, completed=keeper.tidy)
    assert steps_in(tmp_path).keys() == {3}


def test_what_was_found_stays_while_the_run_goes_on(tmp_path):
    keeper = run_of(tmp_path, Keep(1, 0, 0), {1: 0.0})
    with opened(tmp_path) as found:
        write(tmp_path, 2, completed=keeper.tidy)
        assert (found.folder / "index.json").is_file()
    assert found.step == 1


@pytest.mark.parametrize("moment", ["being_read", "first_damaged"])
def test_the_run_goes_on_while_one_is_looked_for(tmp_path, monkeypatch, moment):
    """Neither is a deleted one taken, nor is it called damaged."""
    keeper = run_of(tmp_path, Keep(1, 0, 0), {1: 0.0})
    plain, steps = getattr(finding, moment), iter([2, 3])

    def meanwhile(*arguments):
        if (step := next(steps, None)) is not None:
            write(tmp_path, step, completed=keeper.tidy)
        return plain(*arguments)

    monkeypatch.setattr(finding, moment, meanwhile)
    with opened(tmp_path) as found:
        assert found.step == {"being_read": 3, "first_damaged": 1}[moment]
        assert (found.folder / "index.json").is_file()


@pytest.mark.parametrize("line", ["", "rubbish", "step-00000001", "step-00000001 much", "step-00000001 0.5 0.6"])
def test_a_spoilt_list_of_the_best_is_passed_over(tmp_path, line):
    (tmp_path / "best").write_text(f"{line}\nstep-00000002 0.25\n")
    keeper = Keeper(tmp_path, Keep(1, 0, 1), 5)
    assert keeper.is_best(2)
