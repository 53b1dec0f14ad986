"""Targets, and the page of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness import markdown, markdown_table

OPENING = ("index", "over", "shared", "process", "cpu_s", "wall_s", "peak_mb", "private_mb", "mapped_mb", "read_mb",
           "sent_mb")  # fmt: skip
ORDERS = ("shared", "process", "cpu_s", "wall_s", "private_mb", "mapped_mb", "places")
NODE = ("index", "shared", "measured_mb", "private_rank_mb", "private_loader_mb", "shared_by_a_rank_mb",
        "shared_by_the_node_mb", "ranks", "loaders", "extrapolated_mb")  # fmt: skip
PLACES = ("memory_us", "mapped_us", "ratio")


def judge(rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The targets: their bounds, what was measured, and whether they are met."""
    targets: list[dict[str, Any]] = []

    def add(target: str, value: float, most: float) -> None:
        targets.append({"target": target, "at_most": most, "measured": value, "met": value <= most})

    before = next(row for row in rows if row["index"] == "json" and row["shared"] == "off")
    for kind, process, most in (("json", "second", 0.25), ("table", "first", 0.5), ("table", "second", 0.25)):
        row = next(row for row in rows if (row["index"], row["over"], row["process"]) == (kind, "local", process))
        add(f"{kind}, {process} process: CPU s to open it, at most", row["cpu_s"], 1.0)
        add(f"{kind}, {process} process: peak over that of a JSON each", row["peak_mb"] / before["peak_mb"], most)
    second = next(row for row in rows if (row["index"], row["over"], row["process"]) == ("table", "http", "second"))
    add("table, second process: MB that a server sends", second["sent_mb"], 0.1)
    contents = {row["index"]: {other["content"] for other in rows if other["index"] == row["index"]} for row in rows}
    add("orders of one index by different ways", max(map(len, contents.values())), 1)
    nodes = {(row["index"], row["shared"]): row["extrapolated_mb"] for row in result["node"]}
    add(
        "MB of a node, a table and sharing over a JSON each",
        nodes["table", "on"] / nodes["json", "off"],
        0.1,
    )
    add("CPU time of a place that is mapped over one in memory", result["places"][0]["ratio"], 1.05)
    return targets


def page(machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> str:
    """All tables in Markdown."""
    text = markdown("scale", machine, rows, OPENING)
    for title, name, columns in (
        ("Targets", "targets", ("target", "at_most", "measured", "met")),
        ("Orders", "orders", ORDERS),
        ("A node", "node", NODE),
        ("A place", "places", PLACES),
    ):
        text += f"\n## {title}\n\n" + markdown_table(result[name], columns)
    return text
