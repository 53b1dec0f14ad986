"""What is measured, each time in fresh processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import ROOT, say
from benchmarks.scale.simulated import serving

KINDS = {"json": "json", "table": "table", "wids": "wids/shards.json"}
"""By kind of index, its root below the folder."""
MECHANISMS = ("off", "on")


def ask(what: str, **request: Any) -> Any:
    """What a fresh process measures.

    Raises:
        RuntimeError: it failed; its last lines.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.scale.worker", json.dumps({"what": what, **request})],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise RuntimeError(f"{what}: {ran.stderr[-2000:]}")
    return json.loads(ran.stdout)


def measure_opening(folder: Path, cache: Path) -> list[dict[str, Any]]:
    """Opening each kind of index in a first and in a second process of a node; and bytes that a server sends."""
    rows = []
    for kind, root in KINDS.items():
        for mechanism in MECHANISMS:
            shutil.rmtree(cache, ignore_errors=True)
            for process in ("first", "second") if mechanism == "on" else ("each",):
                row = _open(kind, "local", mechanism, str(folder / root), cache)
                rows.append(row | {"process": process, "sent_mb": None})
    with serving(folder) as server:
        for kind in ("json", "table"):
            shutil.rmtree(cache, ignore_errors=True)
            for process in ("first", "second"):
                before = server.sent
                row = _open(kind, "http", "on", f"{server.url}/{KINDS[kind]}", cache)
                rows.append(row | {"process": process, "sent_mb": (server.sent - before) / 1e6})
    return rows


def _open(kind: str, over: str, mechanism: str, root: str, cache: Path) -> dict[str, Any]:
    row = ask("open", root=root, cache=str(cache) if mechanism == "on" else None)
    say(f"scale: {kind} {over}, shared {mechanism}: {row['cpu_s']:.2f} s, peak {row['peak_mb']:.0f} MB")
    return {"index": kind, "over": over, "shared": mechanism, **row}


def measure_orders(folder: Path, cache: Path) -> list[dict[str, Any]]:
    """Making and mapping the order of an epoch; their places must be the same."""
    shutil.rmtree(cache, ignore_errors=True)
    root, rows = str(folder / KINDS["table"]), []
    for mechanism, process in (("off", "each"), ("on", "first"), ("on", "second")):
        row = ask("orders", root=root, cache=str(cache) if mechanism == "on" else None, places=1000)
        rows.append({"shared": mechanism, "process": process, **row})
    same = all(row["places"] == rows[0]["places"] for row in rows)
    return [{**row, "places": same} for row in rows]


def measure_places(folder: Path, cache: Path, places: int, rounds: int) -> list[dict[str, Any]]:
    """CPU time of a place of an order, in memory and mapped."""
    row = ask("places", root=str(folder / KINDS["table"]), cache=str(cache), places=places, rounds=rounds)
    return [{**row, "ratio": row["mapped_us"] / row["memory_us"]}]


def measure_node(folder: Path, empty: Path, cache: Path, ranks: int, loaders: int) -> list[dict[str, Any]]:
    """Memory of a node of real processes, less that of the same processes with a few shards; and extrapolated.

    Args:
        folder: of the indexes.
        empty: the same indexes of a few shards.
        cache: of the node.
        ranks: of the node that is extrapolated to; real are one and two.
        loaders: processes of each of its ranks; real are two.
    """
    few = {real: _sums(_ask_node(empty, "json", "off", cache, real)) for real in (1, 2)}
    rows = []
    for kind, mechanism in (("json", "off"), ("json", "on"), ("table", "on")):
        found = {}
        for real, without in few.items():
            many = _sums(_ask_node(folder, kind, mechanism, cache, real))
            found[real] = {name: many[name] - without[name] for name in many}
        rank, loader = found[2]["rank"], found[2]["loader"]
        of_ranks = max(0.0, found[2]["shared"] - found[1]["shared"])  # what only the processes of a rank share
        of_node = max(0.0, found[1]["shared"] - of_ranks)
        whole = of_node + ranks * (of_ranks + rank) + ranks * loaders * loader
        row = {"index": kind, "shared": mechanism, "measured_mb": found[2]["total"]}
        row |= {"private_rank_mb": rank, "private_loader_mb": loader}
        row |= {"shared_by_a_rank_mb": of_ranks, "shared_by_the_node_mb": of_node}
        rows.append({**row, "ranks": ranks, "loaders": loaders, "extrapolated_mb": whole})
        say(f"scale: node, {kind}, shared {mechanism}: {whole:.0f} MB at {ranks} x (1 + {loaders})")
    return rows


def _ask_node(folder: Path, kind: str, mechanism: str, cache: Path, ranks: int) -> list[dict[str, Any]]:
    """The processes of a real node of two loader processes a rank."""
    shutil.rmtree(cache, ignore_errors=True)
    given = str(cache) if mechanism == "on" else None
    rows: list[dict[str, Any]] = ask("node", root=str(folder / KINDS[kind]), cache=given, ranks=ranks, loaders=2)
    return rows


def _sums(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Memory of all processes, of one of each kind, and what they have in common, counted once."""
    private = {kind: median(row["private"] for row in rows if row["kind"] == kind) for kind in ("rank", "loader")}
    total = sum(row["pss"] for row in rows)
    return {**private, "total": total, "shared": total - sum(row["private"] for row in rows)}
