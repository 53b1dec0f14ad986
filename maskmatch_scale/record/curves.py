"""Curves of runs as inline SVG, with the text colour and the font of the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

COLOURS = ("#0a7cc4", "#e0661a", "#0f9d78", "#c2609c", "#c79300", "#7a6ff0", "#8a8a8a")
"""Colours of runs, distinct on white and on dark grey and for most colour-blind readers (after Okabe and Ito)."""

MOST_POINTS = 500
"""A curve with more points is drawn as means of neighbouring steps. The chart is about this many px wide."""

MOST_TICKS = 8
"""Values of a setting that are written at its axis."""

# matplotlib does not know currentColor and CSS variables. These colours are replaced by them in its output.
INK, _GRID = "#010203", "#040506"
_SIZE_INCHES = (5.2, 3.1)
# Any: matplotlib's type for this differs between its versions. "none": text stays text, in the page's font.
_STYLE: Any = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK) | {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.linewidth": 0.6,
}


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    label: str
    colour: str
    steps: NDArray[np.int64]
    """(n,) ascending."""
    values: NDArray[np.float64]
    """(n,), NaN where there is nothing to draw."""
    dashed: bool = False


def chart(name: str, title: str, curves: Sequence[Curve], *, smooth: bool = False, markers: bool = False) -> Markup:
    """Draw curves over steps.

    Args:
        name: a word that no other chart of the page has; the ids of elements start with it.
        title: read out by screen readers, together with the last value of each curve.
        curves: those without a finite value are left out, but their steps count for the axis.
        smooth: draw running means, with the raw values pale behind them. The value axis then ends where the running
            means do, so that single spikes do not flatten everything else.
        markers: mark each point; for curves of few points.

    Returns:
        An ``<svg>`` element for HTML, empty if no curve has a finite value. matplotlib's global state is not changed.
    """
    last_step = max((int(curve.steps[-1]) for curve in curves if curve.steps.size), default=0)
    curves = [curve for curve in curves if np.isfinite(curve.values).any()]
    if not curves:
        return Markup()
    drawn = [running_mean(curve.values) if smooth else curve.values for curve in curves]
    with _figure(name) as (figure, axes):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("step")
        for curve, values in zip(curves, drawn):
            if smooth:
                axes.plot(*thinned(curve.steps, curve.values), color=curve.colour, alpha=0.22, linewidth=0.8)
            axes.plot(
                *thinned(curve.steps, values),
                color=curve.colour,
                linewidth=1.6,
                linestyle="--" if curve.dashed else "-",
                marker="o" if markers or curve.steps.size == 1 else None,
                markersize=4,
            )
        # All charts of these runs have the same axis, even if a loss starts late.
        axes.set_xlim(0, last_step * 1.02)
        if smooth:
            highest = max(float(np.nanmax(values)) for values in drawn)
            axes.set_ylim(0, highest * 1.08 or 1)
        document = _document(figure)
    ends = [f"{curve.label} ends at {_last(values):.3g}" for curve, values in zip(curves, drawn)]
    return _inline(document, name, title, ends)


@dataclass(frozen=True)
class Points:
    """Results by the value of one setting, of runs that are alike in everything else."""

    label: str
    colour: str
    at: NDArray[np.float64]
    """(n,) the setting."""
    values: NDArray[np.float64]
    """(n,) the results, finite. Several runs may have one setting: another seed."""


def against(name: str, title: str, setting: str, points: Sequence[Points]) -> Markup:
    """Draw results over a setting: every run is a point, and a line joins the means of equal settings.

    Args:
        name: a word that no other chart of the page has; the ids of elements start with it.
        title: read out by screen readers, together with the best point.
        setting: name of the axis. It is logarithmic if the values are positive and span a factor of ten or more.
        points: one line each; not empty.

    Returns:
        An ``<svg>`` element for HTML. matplotlib's global state is not changed.
    """
    at = np.unique(np.concatenate([group.at for group in points]))
    with _figure(name) as (figure, axes):
        if at[0] > 0 and at[-1] >= 10 * at[0]:
            axes.set_xscale("log")
        axes.set_xticks(at if at.size <= MOST_TICKS else at[:: -(-at.size // MOST_TICKS)])
        axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(setting)
        for group in points:
            means = [(value, group.values[group.at == value].mean()) for value in np.unique(group.at)]
            axes.plot(*zip(*means), color=group.colour, linewidth=1.6)
            axes.plot(group.at, group.values, "o", color=group.colour, markersize=5)
        document = _document(figure)
    best = max(points, key=lambda group: float(group.values.max()))
    place = int(best.values.argmax())
    said = f"best: {best.values[place]:.3g} at {best.at[place]:g}" + (f", {best.label}" if best.label else "")
    return _inline(document, name, title, [said])


@contextmanager
def _figure(name: str) -> Iterator[tuple[Figure, Axes]]:
    """A figure in the style of the page; draw it (:func:`_document`) while the body runs."""
    # With a fixed hash salt the ids, and so the page, are the same for the same runs.
    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_GRID, linewidth=0.6)
        yield figure, axes


def _document(figure: Figure) -> str:
    svg = io.StringIO()
    figure.savefig(svg, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return svg.getvalue()


def running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the finite values in a centred window of 5 % of the steps, which is shorter at both ends.

    Args:
        values: (n,)

    Returns:
        (n,), NaN where ``values`` is NaN, so that a curve does not begin before its first value.
    """
    half = values.size // 40
    valid = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(valid, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(valid)])
    place = np.arange(values.size)
    low, high = np.maximum(place - half, 0), np.minimum(place + half + 1, values.size)
    mean = (total[high] - total[low]) / np.maximum(count[high] - count[low], 1)
    return np.where(valid, mean, np.nan)


def thinned(steps: NDArray[np.int64], values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most :data:`MOST_POINTS` points: means over runs of neighbouring steps.

    Args:
        steps: (n,)
        values: (n,)

    Returns:
        Steps and values, both (min(n, MOST_POINTS),); NaN where a stretch has no finite value.
    """
    if steps.size <= MOST_POINTS:
        return steps.astype(np.float64), values
    edges = np.linspace(0, steps.size, MOST_POINTS + 1).astype(int)
    parts = [values[low:high][np.isfinite(values[low:high])] for low, high in pairwise(edges)]
    means = [part.mean() if part.size else np.nan for part in parts]
    return np.array([steps[low:high].mean() for low, high in pairwise(edges)]), np.array(means)


def _last(values: NDArray[np.float64]) -> float:
    return float(values[np.isfinite(values)][-1])


def _inline(document: str, name: str, title: str, said: Sequence[str]) -> Markup:
    """Turn an SVG document into an element of a page: unique ids, the page's colours, a title and a description."""
    svg = document[document.index("<svg") :]
    # matplotlib uses the same ids in every figure, but they must be unique in a page.
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(INK, "currentColor").replace(_GRID, "var(--line)")
    # Sizes in pt would fix the width. With the view box alone the page decides, and likewise for fonts.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("font: 9px 'DejaVu Sans'", "font: 9px var(--font)")
    words = escape("; ".join(said))
    described = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{words}</desc>'
    opening = f'<svg role="img" aria-labelledby="{name}-title {name}-desc"'
    # This is safe: matplotlib escapes its text, and the title and description were escaped above.
    return Markup(re.sub(r"<svg([^>]*)>", lambda match: f"{opening}{match[1]}>{described}", svg, count=1))
