"""Tables and plots of what was predicted and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import machine_line, markdown_table
from benchmarks.scaling_model.cases import CASES, GPU, LINK, STAGES
from benchmarks.scaling_model.failures import (
    CLOSING_S,
    DAYS,
    DELAY_S,
    HOURS_OF_A_GPU,
    INTERRUPTIONS,
    RESTART_S,
    STORE_BYTES_S,
    STORE_LIMIT_BYTES_S,
    THEIR_GPUS,
)

Rows = Sequence[Mapping[str, Any]]

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#ccbb44")
_STYLES = {1: "-", 2: "--", 3: ":"}


def page(machine: Mapping[str, Any], found: Mapping[str, Rows]) -> str:
    """All tables in Markdown."""
    lines = [
        "# From 1 to 4,096 GPUs, by a model",
        "",
        machine_line(machine),
        "",
        f"Predicted for {GPU} by data sheets and named efficiencies, 8 GPUs a host, {LINK} between hosts. No cluster "
        "was measured. docs/scaling.md says what follows.",
        "",
        "## Measured against predicted",
        "",
        "One machine, gloo, a small ViT in fp32; the loopback of a network namespace is all the network that the ranks "
        "have, of so many Mbit/s together. The step on the slower link is predicted from the step on the faster one.",
        "",
        markdown_table(found["check"], tuple(found["check"][0])) if found["check"] else "Not measured in this run.\n",
    ]
    if found["measured"]:
        lines += [
            "As measured, without a limit too:",
            "",
            markdown_table(found["measured"], tuple(found["measured"][0])),
        ]
    tables = {
        "Weak scaling: a micro-batch for each GPU": "rows",
        "Strong scaling: a global batch": "strong",
        "Checkpoints and failures": "failures",
        "A billion images: shards and index": "shards",
        "A billion images: what is asked of the store": "demand",
    }
    notes = {
        "failures": f"Failures: {INTERRUPTIONS} in {DAYS} days on {THEIR_GPUS:,} GPUs (arXiv 2407.21783), so one in "
        f"{HOURS_OF_A_GPU:,.0f} hours of a GPU. Assumed: a host writes {STORE_BYTES_S / 1e9:g} GB/s, all together "
        f"{STORE_LIMIT_BYTES_S / 1e9:g} GB/s, and {CLOSING_S:g} s besides; steps wait {DELAY_S:g} s beside the copy; "
        f"a restart takes {RESTART_S:g} s.",
    }
    for title, name in tables.items():
        lines += [f"## {title}", ""]
        if name in notes:
            lines += [notes[name], ""]
        lines.append(markdown_table(found[name], tuple(found[name][0])))
    return "\n".join(lines)


def draw(found: Mapping[str, Rows]) -> Figure:
    """Weak and strong scaling, bytes and seconds against measurements, and checkpoints."""
    figure = Figure((14, 9), layout="constrained")
    axes = figure.subplots(2, 3)
    _scaling(axes[0][0], found["rows"], "weak scaling, efficiency")
    largest = max(row["batch"] for row in found["strong"])
    _scaling(
        axes[0][1],
        [r for r in found["strong"] if r["batch"] == largest],
        f"strong scaling, {largest:,} + {largest:,} images",
    )
    _network(axes[0][2], found["rows"])
    _check(axes[1][0], found["check"])
    _failures(axes[1][1], found["failures"])
    _demand(axes[1][2], found["demand"])
    return figure


def _scaling(axis: Axes, rows: Rows, title: str) -> None:
    for case, colour in zip(CASES, _COLOURS):
        for stage in STAGES:
            own = [row for row in rows if row["model"] == case.name and row["zero_stage"] == stage]
            label = case.name if stage == STAGES[0] else None
            axis.plot(
                [r["gpus"] for r in own], [r["efficiency"] for r in own], _STYLES[stage], color=colour, label=label
            )
    _over_gpus(axis, title)
    axis.set_ylim(0, 1.05 * max(1.0, *(row["efficiency"] for row in rows)))
    axis.legend(frameon=False, fontsize=8, title="— ZeRO-1  -- 2  ·· 3", title_fontsize=8)


def _network(axis: Axes, rows: Rows) -> None:
    for case, colour in zip(CASES, _COLOURS):
        for stage in STAGES:
            own = [row for row in rows if row["model"] == case.name and row["zero_stage"] == stage]
            axis.plot([r["gpus"] for r in own], [r["network_share"] for r in own], _STYLES[stage], color=colour)
    _over_gpus(axis, "share of a step that waits for the network")
    axis.set_ylim(0, 1)


def _check(axis: Axes, rows: Rows) -> None:
    """Predicted over measured: on the diagonal they are equal."""
    shown = [row for row in rows if row["predicted_step_s"] is not None]
    for stage, colour in zip(sorted({row["zero_stage"] for row in shown}), _COLOURS):
        own = [row for row in shown if row["zero_stage"] == stage]
        axis.scatter(
            [r["step_s"] for r in own], [r["predicted_step_s"] for r in own], color=colour, label=f"ZeRO-{stage}"
        )
    if shown:
        top = 1.1 * max(max(row["step_s"], row["predicted_step_s"]) for row in shown)
        axis.plot([0, top], [0, top], color="#bbbbbb", zorder=0)
    axis.set_title("a step on a slow link, here", fontsize=10)
    axis.set_xlabel("measured, s")
    axis.set_ylabel("predicted, s")
    if shown:
        axis.legend(frameon=False, fontsize=8)
    else:
        axis.text(0.5, 0.5, "not measured in this run", ha="center", transform=axis.transAxes)


def _failures(axis: Axes, rows: Rows) -> None:
    for case, colour in zip(CASES, _COLOURS):
        own = [row for row in rows if row["model"] == case.name]
        axis.plot([r["gpus"] for r in own], [100 * r["lost"] for r in own], color=colour, label=case.name)
        axis.plot([r["gpus"] for r in own], [100 * r["lost_at_1000_steps"] for r in own], "--", color=colour)
    _over_gpus(axis, "time lost to failures and checkpoints, %")
    axis.set_yscale("log")
    axis.legend(frameon=False, fontsize=8, title="— best interval  -- every 1,000 steps", title_fontsize=8)


def _demand(axis: Axes, rows: Rows) -> None:
    for case, colour in zip(CASES, _COLOURS):
        own = [row for row in rows if row["model"] == case.name]
        axis.plot([r["gpus"] for r in own], [r["store_gb_s"] for r in own], color=colour, label=case.name)
    _over_gpus(axis, "read from the store, GB/s")
    axis.set_yscale("log")
    axis.legend(frameon=False, fontsize=8)


def _over_gpus(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("GPUs")
    axis.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4096"])
