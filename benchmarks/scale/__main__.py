"""The command line: ``python -m benchmarks.scale --out FILE.json``."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import check_out, describe_machine, say, write_json
from benchmarks.scale.measure import measure_node, measure_opening, measure_orders, measure_places
from benchmarks.scale.report import judge, page
from benchmarks.scale.simulated import write_indexes

SOURCES = ("benchmarks/scale", "benchmarks/harness.py", "maskmatch_scale/data", "maskmatch_scale/recipe")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line; prints the reason and exits with 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.scale",
        description="Opens the index of very many shards in real processes of one node, with and without sharing, and "
        "measures seconds, memory and bytes; extrapolates to a node of many ranks.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.json", help="results; a .md is written beside it")
    add("--shards", type=int, default=1_000_000, metavar="N", help="default %(default)s")
    add("--ranks", type=int, default=8, metavar="N", help="of the node that is extrapolated to; default %(default)s")
    add("--loaders", type=int, default=8, metavar="N", help="processes of each of its ranks; default %(default)s")
    add("--places", type=int, default=20_000, metavar="N", help="of a round; default %(default)s")
    add("--rounds", type=int, default=10, metavar="N", help="of timing places; default %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the indexes, measure, and write JSON and Markdown."""
    options = parse(arguments)
    try:
        for name in ("shards", "ranks", "loaders", "places", "rounds"):
            if getattr(options, name) < 1:
                raise ValueError(f"--{name}: {getattr(options, name)}; it must be at least 1")
        check_out(options.out)
    except ValueError as error:
        say(f"scale: {error}")
        return 2
    begin = time.perf_counter()
    machine = describe_machine(torch.device("cpu"), SOURCES)
    with tempfile.TemporaryDirectory() as name:
        folder, empty, cache = (Path(name) / part for part in ("many", "few", "cache"))
        sizes = write_indexes(folder, options.shards)
        write_indexes(empty, 100)
        result: dict[str, Any] = {}
        rows = measure_opening(folder, cache)
        result["orders"] = measure_orders(folder, cache)
        result["node"] = measure_node(folder, empty, cache, options.ranks, options.loaders)
        result["places"] = measure_places(folder, cache, options.places, options.rounds)
        result["targets"] = judge(rows, result)
    machine |= {"shards": options.shards, **{f"{kind}_mb": round(size / 1e6, 1) for kind, size in sizes.items()}}
    machine |= {"seconds": round(time.perf_counter() - begin), "load_at_end": round(os.getloadavg()[0], 2)}
    write_json(options.out, machine, rows, **result)
    options.out.with_suffix(".md").write_text(page(machine, rows, result), encoding="utf-8")
    say(f"scale: wrote {options.out}, and .md beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
