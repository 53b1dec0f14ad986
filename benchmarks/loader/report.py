"""What is shown of the rows: whether targets are met, tables in Markdown and the plot."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import markdown, markdown_table

ROW = ("variant", "over", "processes", "samples_per_core_s", "of_limit", "samples_per_s", "waiting", "waiting_median")

OF_LIMIT = 0.85
"""Samples a CPU second as a share of the bare decoder's, with loader processes."""

OF_LIMIT_HERE = 0.97
"""The same in the consumer's own process."""

HELD_MB = 1.0
"""Growth in 10,000 samples, of the second half of the long run, up to which memory counts as flat."""


def slope(rows: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Growth of memory over the second half in MB per 10,000 samples, by least squares, and its standard error."""
    half = rows[len(rows) // 2 :]
    x = np.array([row["samples"] for row in half]) / 1e4
    y = np.array([row["pss_mb"] for row in half])
    if len(half) < 3:
        return 0.0, 0.0
    x = x - x.mean()
    a = float((x * y).sum() / (x * x).sum())
    rest = y - y.mean() - a * x
    return a, float(np.sqrt((rest**2).sum() / (len(x) - 2) / (x * x).sum()))


def judge(result: Mapping[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The targets: their bounds, what was measured, and whether they are met."""
    by = {(r["variant"], r["over"], r["processes"]): r for r in result["rows"] if r["environment"] == "main"}
    targets: list[dict[str, Any]] = []

    def add(target: str, value: float, most: float | None = None, least: float | None = None) -> None:
        met = (most is None or value <= most) and (least is None or value >= least)
        targets.append({"target": target, "bound": most if least is None else least, "measured": value, "met": met})

    n = options.processes
    for processes in (0, n):
        ours, plain = by["ours", "local", processes], by["webdataset", "local", processes]
        bound = OF_LIMIT if processes else OF_LIMIT_HERE
        said = f"local shards, {processes} processes" if processes else "local shards, in the consumer's process"
        add(f"share of the bare limit a core, at least ({said})", ours["of_limit"], least=bound)
        over = ours["samples_per_core_s"] / plain["samples_per_core_s"]
        add(f"samples/s a core over plain webdataset's, at least ({said})", over, least=1)
        over = ours["samples_per_s"] / plain["samples_per_s"]
        add(f"samples/s on the wall over plain webdataset's, at least ({said})", over, least=1)
    for over in ("local", "http"):
        share = by["sequential", over, n]["of_limit"]
        add(
            f"share of the bare limit a core, at least (shards in sequence, {over}, {n} processes)",
            share,
            least=OF_LIMIT,
        )
    for row in result["resume"]:
        add(f"resume less a shard's download, s, at most ({row['over']}, step {row['step']})", row["cost_s"], most=2)
    changed = [row for row in result["state"] if row["changes"] <= 1]
    largest, shards = max(row["bytes"] for row in changed), options.state_shards
    add(f"bytes of the state with {shards} shards, {options.ranks} ranks, one change, at most", largest, most=100_000)
    repeated = max(result["state"], key=lambda row: row["bytes"])
    said = f"bytes of the state with {shards} shards, {repeated['changes']} changes in one epoch, at most"
    add(said, repeated["bytes"], most=100_000)
    (index,) = result["index"]
    add(f"seconds to load an index of {index['shards']} shards, at most", index["load_s"], most=10)
    add("peak MB of that process, at most", index["peak_mb"], most=2000)
    a, _ = slope(result["memory"])
    add("MB in 10,000 samples over the second half of the long run, at most", a, most=HELD_MB)
    return targets


def page(machine: Mapping[str, Any], rows: Sequence[dict[str, Any]], result: Mapping[str, Any]) -> str:
    """All tables in Markdown; ``result`` has the lists beside the rows of rates."""
    shown = [
        row | {"variant": f"{row['variant']} (peers)" if row["environment"] == "peers" else row["variant"]}
        for row in rows
    ]
    peers = ", ".join(f"{name} {version}" for name, version in machine["peers"].items())
    text = markdown("loader", {**machine, "peers": peers}, shown, ROW)
    for reason in sorted({f"{row['variant']} was left out: {row['skipped']}." for row in rows if "skipped" in row}):
        text += f"\n{reason}\n"
    a, error = slope(result["memory"])
    text += "\n## Targets\n\n" + markdown_table(result["targets"], ("target", "bound", "measured", "met"))
    columns = ("over", "step", "seconds_median", "seconds_max", "shard_s", "cost_s")
    text += "\n## Seconds to the first batch\n\n" + markdown_table(result["resume"], columns)
    text += "\n## State\n\n" + markdown_table(result["state"], ("shards", "ranks", "changes", "bytes"))
    text += "\n## Large index\n\n" + markdown_table(result["index"], tuple(result["index"][0]))
    text += f"\n## Memory\n\nOver the second half of {result['memory'][-1]['samples']} samples: "
    return text + f"{a:+.2f} ± {error:.2f} MB in 10,000 samples.\n"


def draw(rows: Sequence[Mapping[str, Any]], memory: Sequence[Mapping[str, float]]) -> Figure:
    """Left: samples a CPU second of every loader as a share of the bare limit; right: memory over a long run."""
    figure = Figure((14, 6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    shown = [row for row in rows if row["variant"] != "bare"]
    shown.sort(key=lambda row: (row["over"] != "local", row["processes"], -row["of_limit"]))
    places = range(len(shown))
    colours = ["#4477aa" if row["variant"] in ("ours", "sequential") else "#bbbbbb" for row in shown]
    left.barh(places, [row["of_limit"] for row in shown], color=colours, height=0.7)
    for place, row in zip(places, shown):
        waits = f", waits {row['waiting']:.0%}" if row["waiting"] is not None else ""
        text = f"{row['of_limit']:.2f} ({row['samples_per_core_s']:.0f}/s{waits})"
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        left.text(row["of_limit"] + 0.01, place, text, va="center", fontsize=8, bbox=ground)
    left.axvline(OF_LIMIT, color="#cc3311", linewidth=1.5, zorder=1.5)
    left.set_yticks(places, [row["label"] for row in shown], fontsize=8)
    left.invert_yaxis()
    left.set_xlim(0, 1.45)
    left.set_xlabel("samples a CPU second as a share of the bare decode + augment limit (red: target with processes)")
    right.plot([row["samples"] for row in memory], [row["pss_mb"] for row in memory], color="#4477aa")
    a, error = slope(memory)
    right.set_title(f"second half: {a:+.2f} ± {error:.2f} MB in 10,000 samples", fontsize=9)
    right.set_ylim(0, 1.15 * max(row["pss_mb"] for row in memory))
    right.set_xlabel("samples")
    right.set_ylabel("consumer and loader processes, PSS, 10⁶ bytes")
    return figure
