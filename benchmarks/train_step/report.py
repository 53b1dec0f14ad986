"""What is shown of the rows: two tables in Markdown and the plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness import markdown, markdown_table

COLUMNS = (
    *("backbone", "image_size", "classes", "images", "step", "seconds_min", "seconds_median"),
    *("speedup", "limit", "efficiency", "peak_mb"),
)

PART_COLUMNS = ("backbone", "step", "part", "seconds_min", "share")


def page(machine: Mapping[str, Any], rows: Sequence[dict[str, Any]], parts: Sequence[dict[str, Any]]) -> str:
    """Both tables in Markdown; `mfu` is shown where the device's peak is known."""
    known = any(row["mfu"] is not None for row in rows)
    tables = markdown("train_step", machine, rows, (*COLUMNS, "mfu") if known else COLUMNS)
    return tables + "\n## Where the time goes\n\n" + markdown_table(parts, PART_COLUMNS)


def draw(rows: Sequence[dict[str, Any]], parts: Sequence[dict[str, Any]]) -> Figure:
    """Two stacked bars a backbone: where a step's seconds go."""
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))  # of one size and precision
    figure = Figure(figsize=(9, 0.8 + 1.8 * len(backbones)), layout="constrained")
    colours = {
        "teacher, three scales": "#0072b2", "labelled view": "#009e73",
        "strong view": "#56b4e9", "masked view": "#d55e00", "optimizer and EMA": "0.6",
    }  # fmt: skip
    for panel, backbone in zip(figure.subplots(len(backbones), 1, squeeze=False).flat, backbones):
        steps = [row["step"] for row in rows if row["backbone"] == backbone]
        for place, step in enumerate(steps):
            left = 0.0
            for part in parts:
                if (part["backbone"], part["step"]) != (backbone, step) or part["part"].startswith("of it"):
                    continue
                panel.barh(place, part["seconds_min"], left=left, color=colours[part["part"]], label=part["part"])
                left += part["seconds_min"]
            row = next(r for r in rows if (r["backbone"], r["step"]) == (backbone, step))
            if not left:  # its parts are not measured
                left = row["seconds_min"]
                panel.barh(place, left, color="0.85", label="whole step")
            panel.text(left, place, f"  {row['seconds_min']:.3g} s, {row['speedup']:.2f}×", va="center", fontsize=9)
        limit = next(r["limit"] for r in rows if r["backbone"] == backbone and r["step"] == "ours")
        panel.set_yticks(range(len(steps)), steps)
        panel.invert_yaxis()
        panel.margins(x=0.15)
        panel.set_title(
            f"{backbone.rpartition('/')[2]}: masking alone could give {limit:.2f}×", fontsize=10, loc="left"
        )
        panel.set_xlabel("seconds a step", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    handles = {text: handle for panel in figure.axes for handle, text in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure
