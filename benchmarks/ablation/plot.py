"""The plot: every draw as a point, paired differences with their intervals, learning curves by steps and by cost.

Where runs were scored at their end alone, there are no curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from benchmarks.ablation.gather import BASELINES, MARKS, by_arm, main_split, value_of

MOST_CURVES = 8
"""Arms whose curves are drawn; more could not be told apart."""
FILLED = {MARKS[0]: True, MARKS[1]: False}
"""Markers at equal steps are filled, at equal cost open."""


def draw(
    title: str,
    cells: Sequence[dict[str, Any]],
    differences: Sequence[Mapping[str, Any]],
    curves: Sequence[Mapping[str, Any]],
) -> Figure:
    """All panels.

    Args:
        title: of the figure.
        cells: from `read_cells`.
        differences: from `difference_rows`.
        curves: from `curves_of`.
    """
    arms = by_arm(cells)
    colours = {
        arm: colormaps["tab10" if len(arms) <= 10 else "tab20"](n % (10 if len(arms) <= 10 else 20))
        for n, arm in enumerate(arms)
    }
    height = max(2.2, 0.9 + 0.42 * len(arms))
    has_curves = len({point["step"] for point in curves}) > 1
    figure = Figure(figsize=(13, height + (5.2 if has_curves else 0.6)), layout="constrained")
    figure.suptitle(title)
    heights = [height, 4.6] if has_curves else [height]
    upper, *lower = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat
    scores, *against = upper.subplots(1, 3, sharey=True, width_ratios=[1.2, 1, 1])
    both = any(MARKS[1] in cell["results"] for cell in cells)
    _scores(scores, arms, colours, both=both)
    for panel, baseline in zip(against, BASELINES, strict=True):
        if baseline not in arms:
            panel.set_visible(False)
            continue
        _against(panel, list(arms), baseline, differences, colours, both=both)
        panel.set_xlabel(f"mIoU minus that of {arms[baseline][0]['title']}")
    for part in lower:
        _draw_curves(part, cells, arms, curves, colours)
    return figure


def _draw_curves(
    part: SubFigure,
    cells: Sequence[dict[str, Any]],
    arms: Mapping[str, Sequence[dict[str, Any]]],
    curves: Sequence[Mapping[str, Any]],
    colours: Mapping[str, Any],
) -> None:
    by_steps, by_cost = part.subplots(1, 2, sharey=True)
    _curves(by_steps, arms, curves, colours, "step", "steps")
    if all(point["cost_cpu_s"] is not None for point in curves):
        _curves(
            by_cost, arms, curves, colours, "cost_cpu_s", "CPU-seconds of one thread, by the measured cost of a step"
        )
    else:
        _curves(by_cost, arms, curves, colours, "tmacs", "multiply–adds of the backbone, 10¹²")
    some = cells[0]["curve_images"]
    by_steps.set_ylabel(f"mIoU of the teacher on dev{f' ({some} images)' if some else ''}")
    left_out = len(arms) - len(_with_curves(arms))
    by_steps.legend(
        fontsize=8,
        title="bold: mean; faint: each draw" + (f"\n(the last {left_out} arms are not drawn)" if left_out else ""),
        title_fontsize=8,
    )


def _heights(count: int, mark: str, *, both: bool) -> list[float]:
    """Heights of the arms in a panel, the first on top; the marks, if there are both, a little apart."""
    shift = 0.14 * both * (1 if mark == MARKS[0] else -1)
    return [count - 1 - number + shift for number in range(count)]


def _scores(
    panel: Axes, arms: Mapping[str, Sequence[dict[str, Any]]], colours: Mapping[str, Any], *, both: bool
) -> None:
    for mark in MARKS:
        for (arm, cells), y in zip(arms.items(), _heights(len(arms), mark, both=both), strict=True):
            values = [value for cell in cells if (value := value_of(cell, mark)) is not None]
            if not values:
                continue
            face = colours[arm] if FILLED[mark] else "none"
            panel.scatter(values, [y] * len(values), s=22, facecolors=face, edgecolors=[colours[arm]], alpha=0.8)
            panel.plot([mean(values)] * 2, [y - 0.13, y + 0.13], color="black", linewidth=1.6)
    panel.set_yticks(range(len(arms)), [cells[0]["title"] for cells in reversed(list(arms.values()))])
    panel.set_xlabel(f"mIoU on {main_split(next(iter(arms.values()))[0])}: a point a draw, a bar their mean")
    panel.grid(axis="x", alpha=0.3)
    panel.set_title("filled: equal steps; open: equal cost" if both else "equal steps", fontsize=9)


def _against(
    panel: Axes,
    arms: Sequence[str],
    baseline: str,
    differences: Sequence[Mapping[str, Any]],
    colours: Mapping[str, Any],
    *,
    both: bool,
) -> None:
    for mark in MARKS:
        for arm, y in zip(arms, _heights(len(arms), mark, both=both), strict=True):
            for row in differences:
                if (row["arm"], row["minus"], row["at"]) != (arm, baseline, mark):
                    continue
                if row["low"] is not None:
                    panel.plot([row["low"], row["high"]], [y, y], color=colours[arm], linewidth=1.6)
                face = colours[arm] if FILLED[mark] else "white"
                panel.scatter([row["difference"]], [y], s=30, facecolors=[face], edgecolors=[colours[arm]], zorder=3)
    panel.axvline(0, color="0.4", linewidth=0.8)
    panel.grid(axis="x", alpha=0.3)
    panel.locator_params(axis="x", nbins=5)
    panel.set_title("paired by draw: mean, 95 % interval", fontsize=9)


def _with_curves(arms: Mapping[str, object]) -> list[str]:
    """The arms whose curves are drawn: the main ones first."""
    return sorted(arms, key=lambda arm: arm not in (*BASELINES, "maskmatch"))[:MOST_CURVES]


def _curves(
    panel: Axes,
    arms: Mapping[str, Sequence[dict[str, Any]]],
    curves: Sequence[Mapping[str, Any]],
    colours: Mapping[str, Any],
    key: str,
    label: str,
) -> None:
    for arm in _with_curves(arms):
        points: dict[int, list[Mapping[str, Any]]] = {}
        for point in curves:
            if point["arm"] == arm:
                points.setdefault(point["step"], []).append(point)
        # Only where all draws are: else the mean would jump.
        whole = [at for _, at in sorted(points.items()) if len(at) == len(arms[arm])]
        x = [mean(point[key] for point in at) for at in whole]
        panel.plot(
            x, [mean(point["miou"] for point in at) for at in whole], color=colours[arm], label=arms[arm][0]["title"]
        )
        for draw_number in {point["draw"] for at in whole for point in at}:
            own = [point for at in whole for point in at if point["draw"] == draw_number]
            panel.plot(
                [point[key] for point in own], [point["miou"] for point in own], color=colours[arm], alpha=0.25, lw=0.8
            )
    panel.set_xlabel(label)
    panel.grid(alpha=0.3)
