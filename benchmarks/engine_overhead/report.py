"""What is shown of the rows: whether targets are met, three tables in Markdown and the plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness import markdown, markdown_table

TARGETS = {1: 1.05, 2: 1.10, 3: 1.35}
"""By ZeRO stage: largest ratio of its step to DDP's, by the least wall time of the slowest rank over all rounds."""

EMA_TARGET = 0.01
"""Largest share of the supervised step that the teacher's update may take. At stage 3 it must not send a byte."""

MEMORY_TARGET = 0.05
"""Largest deviation of the measured bytes from the formula."""

COLUMNS = ("variant", "step_s", "step_s_median", "ratio", "target", "met", "ratio_median", "cpu_ratio", "apart")

TEACHER_COLUMNS = ("variant", "teacher", "ema_s", "ema_share", "met", "ema_bytes", "ema_collectives", "forward_bytes")

MEMORY_COLUMNS = ("variant", "part", "moment", "formula", "formula_mb", "memory_mb", "deviation", "met", "buckets_mb")


def judge(found: Mapping[str, list[dict[str, Any]]]) -> None:
    """Add `target` and `met` to every row; None where there is no target."""
    for row in found["rows"]:
        target = TARGETS.get(row["zero_stage"])
        row |= {"target": target, "met": None if target is None else row["ratio"] <= target}
    for row in found["teachers"]:
        silent = row["zero_stage"] != 3 or row["ema_bytes"] == 0
        row |= {"target": EMA_TARGET, "met": row["ema_share"] <= EMA_TARGET and silent}
    for row in found["memory"]:
        row |= {"target": MEMORY_TARGET, "met": abs(row["deviation"]) <= MEMORY_TARGET}


def page(machine: Mapping[str, Any], found: Mapping[str, list[dict[str, Any]]]) -> str:
    """The three tables in Markdown; `mfu` is shown where the device's peak is known."""
    known = any(row["mfu"] is not None for row in found["rows"])
    tables = markdown("engine_overhead", machine, found["rows"], (*COLUMNS, "mfu") if known else COLUMNS)
    tables += "\n## The teacher's average\n\n" + markdown_table(found["teachers"], TEACHER_COLUMNS)
    return tables + "\n## Model states on a rank\n\n" + markdown_table(found["memory"], MEMORY_COLUMNS)


def draw(rows: Sequence[Mapping[str, Any]], memory: Sequence[Mapping[str, Any]]) -> Figure:
    """Left: every variant's step as a multiple of DDP's, with its target; right: model states, measured and formula."""
    figure = Figure((13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [row["variant"].removeprefix("deepspeed ") for row in rows]
    places = range(len(rows))
    left.barh(places, [row["ratio"] for row in rows], color="#4477aa", height=0.7)
    for place, row in zip(places, rows):
        left.text(row["ratio"] + 0.01, place, f"{row['ratio']:.2f}", va="center", fontsize=8)
        if row["target"] is not None:
            left.plot([row["target"]] * 2, [place - 0.42, place + 0.42], color="#cc3311", linewidth=2)
    left.set_yticks(places, names, fontsize=8)
    left.invert_yaxis()
    left.set_xlim(0.8, max(1.45, max(row["ratio"] for row in rows) + 0.1))
    left.set_xlabel("wall time of a step as a multiple of DDP's (red: target)")
    states = [row for row in memory if row["part"] == "student" and row["moment"] == "before the optimizer's step"]
    places = range(len(states))
    right.barh(
        [p - 0.2 for p in places], [r["formula_mb"] for r in states], height=0.38, label="formula", color="#bbbbbb"
    )
    right.barh(
        [p + 0.2 for p in places], [r["memory_mb"] for r in states], height=0.38, label="measured", color="#4477aa"
    )
    right.set_yticks(places, [f"{r['variant'].removeprefix('deepspeed ')}\n{r['formula']}" for r in states], fontsize=7)
    right.invert_yaxis()
    right.set_xlabel("model states on a rank without the teacher, 10⁶ bytes")
    right.legend(frameon=False)
    return figure
