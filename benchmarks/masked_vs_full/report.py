"""What is shown of the rows: two tables in Markdown and the plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness import markdown, markdown_table
from benchmarks.masked_vs_full.cases import Case
from benchmarks.masked_vs_full.measure import PASSES

CONTRACT = (
    *("backbone", "image_size", "batch", "dtype", "pass", "mode", "keep"),
    *("img_per_s", "gmacs", "speedup", "ideal_speedup", "efficiency", "peak_mb"),
)
"""Keys that every row begins with, on which readers rely; more keys follow in the JSON."""

COLUMNS = (*CONTRACT, "runner", "over_library", "gather_share")
"""Columns of the first table in Markdown; `mfu` is added where the device's peak is known."""

PEER_COLUMNS = (
    *("backbone", "image_size", "batch", "dtype", "part", "pass", "ours img/s", "library img/s", "speedup"),
    *("ours peak_mb", "library peak_mb", "max_abs_difference"),
)
"""Columns of the second table, which has a row for each pair of peers."""


def pair_up(peers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `PEER_COLUMNS`: each row of ours beside the row of the library that follows it in `peers`."""
    return [
        {
            **{key: ours[key] for key in PEER_COLUMNS if key in ours},
            "ours img/s": ours["img_per_s"],
            "library img/s": library["img_per_s"],
            "ours peak_mb": ours["peak_mb"],
            "library peak_mb": library["peak_mb"],
        }
        for ours, library in zip(peers[::2], peers[1::2], strict=True)
    ]


def page(machine: Mapping[str, Any], rows: Sequence[dict[str, Any]], peers: Sequence[dict[str, Any]]) -> str:
    """The two tables in Markdown."""
    known = any(row["mfu"] is not None for row in rows)
    columns = (*COLUMNS, "mfu") if known else COLUMNS
    return "\n".join(
        [
            markdown("masked_vs_full", machine, rows, columns),
            "## Against the libraries as they ship",
            "",
            "Whole images, the same weights: `Segmenter` against the forward of timm and of transformers. `speedup` is",
            "the library's seconds over ours.",
            "",
            markdown_table(pair_up(peers), PEER_COLUMNS),
        ]
    )


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Speed-up against keep ratio with the ideal curve: a row of panels a case, a column a pass."""
    cases = list(dict.fromkeys(Case(*(row[key] for key in CONTRACT[:4])) for row in rows))
    figure = Figure(figsize=(10, 0.6 + 3.4 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), len(PASSES), squeeze=False, sharex=True, sharey="row")
    for (i, case), (j, kind) in product(enumerate(cases), enumerate(PASSES)):
        panel = panels[i, j]
        of_panel = [row for row in rows if row["pass"] == kind and row.items() >= vars(case).items()]
        drop = [row for row in of_panel if row["mode"] == "drop"]
        zero = [row for row in of_panel if row["mode"] == "zero"]
        library = [row for row in of_panel if row["mode"] == "library"]
        keep = [row["keep"] for row in drop]
        panel.plot(keep, [row["ideal_speedup"] for row in drop], "x--", color="0.45", label="drop: ideal, by GMACs")
        panel.plot(keep, [row["speedup"] for row in drop], "o-", color="#0072b2", label="drop: measured (% of ideal)")
        for row in drop:
            panel.annotate(
                f"{row['efficiency']:.0%}", (row["keep"], row["speedup"]), (0, -6), textcoords="offset points",
                ha="center", va="top", fontsize=8, color="#0072b2",
            )  # fmt: skip
        panel.plot(
            [row["keep"] for row in zero], [row["speedup"] for row in zero], "s", color="#d55e00", ms=5,
            label="zero: measured",
        )  # fmt: skip
        panel.plot(
            [1.0] * len(library), [row["speedup"] for row in library], "D", color="#009e73", ms=5, mfc="none",
            label="whole image: the library's own",
        )  # fmt: skip
        panel.axhline(1, color="0.7", lw=0.8, zorder=0)
        panel.set_title(f"{case.backbone.rstrip('/').rpartition('/')[2]}: {kind}", fontsize=10)
        # Both axes logarithmic: a constant efficiency is a constant distance, at every keep ratio.
        panel.set(xscale="log", yscale="log")
        panel.set_xticks(keep, [f"{value:g}" for value in keep], minor=False)
        panel.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5×", "1×", "2×", "5×", "10×", "20×", "50×"])
        panel.minorticks_off()
        panel.margins(x=0.07)
        panel.spines[["top", "right"]].set_visible(False)
        if j == 0:
            panel.set_ylabel(f"speed-up over full\n{case.image_size} px, batch {case.batch}, {case.dtype}", fontsize=9)
        if i == len(cases) - 1:
            panel.set_xlabel("keep: share of visible units")
    for i, case in enumerate(cases):
        shown = [
            row[key]
            for row in rows
            if row.items() >= vars(case).items()
            for key in ("speedup", "ideal_speedup")
        ]  # fmt: skip
        panels[i, 0].set_ylim(min(shown) / 1.35, max(shown) * 1.2)  # room for the percentages
    panels[0, 0].legend(frameon=False, fontsize=8.5)
    return figure
