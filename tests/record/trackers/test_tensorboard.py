"""Event files of a run that takes some steps again."""

import pytest

from maskmatch_scale.record.trackers.protocol import TrackedRun

pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def test_steps_that_are_taken_again_replace_those_of_before(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from maskmatch_scale.record.trackers.tensorboard import TensorBoard

    known_as = None
    for start, value in ((0, 1.0), (2, 5.0)):  # killed after step 4, continued from the checkpoint of step 2
        tracker = TensorBoard(TrackedRun(tmp_path, "shapes", {"run": {}}, start, known_as))
        known_as = tracker.known_as
        for step in range(start + 1, 5):
            tracker.send(step, {"train/loss": value})
        tracker.close("stopped")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == [(1, 1.0), (2, 1.0), (3, 5.0), (4, 5.0)]
