"""Which settings get a chart of results, and which runs lie on one line."""

import re

import numpy as np
import pytest
from omegaconf import OmegaConf

from maskmatch_scale.record.curves import Points, against
from maskmatch_scale.record.report import write_report
from maskmatch_scale.record.swept import swept
from tests.record.conftest import SUPERVISED, write_run


def runs(*rows):
    """(flat recipe, result) of rows of lr, keep, seed, result."""
    return [({"optim.lr": lr, "method.mask.keep": keep, "run.seed": seed, "run.dir": f"{lr},{keep}"}, result)
            for lr, keep, seed, result in rows]  # fmt: skip


def lines(found):
    return [(line.label, line.at.tolist(), line.values.tolist()) for line in found.lines]


def test_runs_that_are_alike_but_for_the_seed_are_one_line():
    rows = [
        (lr, keep, seed, lr * 10 + (keep or 0) + seed) for keep in (None, 0.5) for lr in (3, 1, 2) for seed in (0, 1)
    ]
    (found,) = swept(runs(*rows, (1, 0.5, 7, None)))
    assert found.key == "optim.lr"  # the share of visible units has one number alone
    at = [1, 1, 2, 2, 3, 3]
    assert lines(found) == [
        ("method.mask.keep=null", at, [10, 11, 20, 21, 30, 31]),
        ("method.mask.keep=0.5", at, [10.5, 11.5, 20.5, 21.5, 30.5, 31.5]),
    ]
    assert len({line.colour for line in found.lines}) == 2


def test_a_setting_needs_three_numbers_with_results():
    assert swept(runs((1, 0.3, 0, 0.5), (2, 0.3, 0, 0.6), (3, 0.3, 0, None))) == []
    assert swept(runs(("a", 0.3, 0, 0.5), ("b", 0.3, 0, 0.6), ("c", 0.3, 0, 0.7))) == []
    assert swept(runs((1, 0.3, 0, 0.5), (1, 0.3, 1, 0.6), (1, 0.3, 2, 0.7))) == []  # seeds are no setting
    assert swept([]) == []


def test_runs_of_which_no_two_are_alike_are_points_without_names():
    by_lr, by_keep = swept(runs((1, 0.1, 0, 0.5), (2, 0.3, 0, 0.6), (3, 0.2, 0, 0.4)))
    assert lines(by_lr) == [("", [1, 2, 3], [0.5, 0.6, 0.4])]
    assert lines(by_keep) == [("", [0.1, 0.2, 0.3], [0.5, 0.4, 0.6])]


@pytest.mark.parametrize(
    ("at", "logarithmic"), [([1e-5, 1e-4, 1e-3], True), ([0.1, 0.2, 0.9], False), ([0, 1, 100], False)]
)
def test_an_axis_of_wide_positive_values_is_logarithmic(at, logarithmic):
    drawn = str(against("a", "T", "optim.lr", [Points("x", "#ff0000", np.array(at), np.array([0.1, 0.3, 0.2]))]))
    assert f"best: 0.3 at {at[1]:g}, x" in drawn
    places = re.findall(r'<use [^>]*x="([0-9.]+)"[^>]*fill: #ff0000', drawn)
    first, second, third = map(float, places)
    even = (second - first) / (third - first)
    expected = 0.5 if logarithmic else (at[1] - at[0]) / (at[2] - at[0])
    assert even == pytest.approx(expected, abs=1e-3)
    assert all(f">{value:g}<" in drawn for value in at)


def test_the_report_has_the_chart_of_runs_that_have_finished(tmp_path):
    folders = []
    for lr in (1e-5, 1e-4, 1e-3, 1e-2):
        folder = write_run(tmp_path / f"optim.lr={lr:g}", method=SUPERVISED, closed=lr < 1e-2)
        recipe = OmegaConf.load(folder / "recipe.yaml")
        recipe.optim = {"lr": lr}
        OmegaConf.save(recipe, folder / "recipe.yaml")
        folders.append(folder)
    page = write_report(folders).read_text()
    assert "<h2>Results by setting</h2>" in page
    chart = page[page.index('<figure class="swept">') :]
    chart = chart[: chart.index("</figure>")]
    assert "mIoU on dev by optim.lr" in chart
    assert "best: 0.4 at 1e-05" in chart  # all of them have that figure; the first counts
    assert ">0.001<" in chart
    assert ">0.01<" not in chart
    assert "Results by setting" not in write_report(folders[:2]).read_text()
