"""The line of progress: what it shows of a record."""

import pytest

from maskmatch_scale.record.progress import TrainingProgress

RECORD = {"step": 5, "loss": 1.25, "loss_u": None, "images_per_s": 12.34, "tokens_per_s": 45678.9, "data_wait_s": 0.0}


@pytest.mark.parametrize(
    ("more", "shown", "hidden"),
    [
        ({"mfu": None, "gpu_peak_gb": None}, ["loss 1.250", "12.3 img/s", "45,679 tok/s"], ["MFU", "peak", "None"]),
        ({"mfu": 0.384, "gpu_peak_gb": 31.26}, ["12.3 img/s", "MFU 38%", "peak 31.3 GB"], ["None"]),
    ],
)
def test_figures_that_there_are(capsys, more, shown, hidden):
    TrainingProgress(10, 0, shown=True).figures(RECORD | more)
    line = capsys.readouterr().out
    assert line.startswith("step 5/10")
    assert all(text in line for text in shown), line
    assert not any(text in line for text in hidden), line
