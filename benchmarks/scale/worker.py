"""A process that opens an index, makes orders, or stands for a node; prints what it measured as JSON.

``python -m benchmarks.scale.worker JSON``
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

from maskmatch_scale.data.order.epoch import EpochOrder, permutation
from maskmatch_scale.data.order.source import WeightedSource
from maskmatch_scale.data.shards.finding import find_index
from maskmatch_scale.data.shards.folder import fetch_options
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.memory import return_freed_memory
from maskmatch_scale.recipe import DataRecipe

WINDOW = 4096
EPOCHS = 4
"""Orders that a source keeps."""
_FORK = multiprocessing.get_context("fork")


def memory_mb() -> dict[str, float]:
    """Memory of this process in 10⁶ bytes.

    ``private`` is what nobody else has (Private_Dirty: a file that is mapped read-only is never in it, also if no other
    process maps it now), ``pss`` its share of all, ``mapped`` its share of files, ``resident`` all that it can see.
    """
    sizes: dict[str, int] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, size = line.split()[:2]
        sizes[name.rstrip(":")] = int(size) * 1024
    names = {"private": "Private_Dirty", "pss": "Pss", "mapped": "Pss_File", "resident": "Rss"}
    return {name: sizes[of_kernel] / 1e6 for name, of_kernel in names.items()}


def _peak_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
    return int(peak) * 1024 / 1e6


def _read_bytes() -> int:
    """Bytes that this process has read by system calls, from files and sockets; not what it has mapped."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def _opened(root: str, cache: str | None) -> WeightedSource:
    """The source of an index; without ``cache`` nothing is shared, as before."""
    data = DataRecipe(root=root, cache_dir=cache)
    index = find_index(root, None if cache is None else fetch_options(data))
    stream = ShardStream(root, "unlabelled", data, index=index, strict=False)
    if cache is None:
        stream.arrays = None
    return WeightedSource(stream, "unlabelled", 1, WINDOW)


def _touch(order: EpochOrder) -> int:
    """Read all that an order holds, as an epoch does."""
    return int(order.shards.sum()) + int(order.starts.sum())


def _touch_table(source: WeightedSource) -> int:
    table = source.stream.shards
    columns = [*table.columns().values(), table.starts, source.sizes]
    return sum(int(column.sum()) for column in columns)


def open_index(root: str, cache: str | None) -> dict[str, Any]:
    """Seconds, memory and bytes of opening an index and its source."""
    before, read, peak = memory_mb(), _read_bytes(), _peak_mb()
    cpu, wall = time.process_time(), time.perf_counter()
    source = _opened(root, cache)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    most = _peak_mb() - min(peak, before["resident"])
    _touch_table(source)
    after = memory_mb()
    return {
        "shards": len(source.stream.shards),
        "cpu_s": cpu,
        "wall_s": wall,
        "peak_mb": most,
        "private_mb": after["private"] - before["private"],
        "mapped_mb": after["mapped"] - before["mapped"],
        "read_mb": (_read_bytes() - read) / 1e6,
        "content": source.info.content,
    }


def make_orders(root: str, cache: str | None, places: int) -> dict[str, Any]:
    """Seconds of an order of an epoch, memory of those that are kept, and some places of the first."""
    source = _opened(root, cache)
    return_freed_memory()  # so that what is returned below is that of the orders
    before, cpu, wall = memory_mb(), time.process_time(), time.perf_counter()
    orders = [source.order(epoch, 8) for epoch in range(EPOCHS)]
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    for order in orders:
        _touch(order)
    after, length = memory_mb(), len(orders[0])
    return {
        "cpu_s": cpu / EPOCHS,
        "wall_s": wall / EPOCHS,
        "private_mb": (after["private"] - before["private"]) / EPOCHS,
        "mapped_mb": (after["mapped"] - before["mapped"]) / EPOCHS,
        "places": [list(orders[0][place]) for place in range(0, length, max(1, length // places))],
    }


def time_places(root: str, cache: str, places: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of places of an order that is in memory, and of one that is mapped; in turns, the least of each."""
    kinds = {"memory": _opened(root, None).order(0, 8), "mapped": _opened(root, cache).order(0, 8)}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for order in kinds.values():
        _touch(order)
    for number in range(rounds):
        for kind in sorted(kinds, reverse=bool(number % 2)):
            order, begin = kinds[kind], time.process_time()
            for place in range(number * places, (number + 1) * places):
                order[place % len(order)]
            seconds[kind].append(time.process_time() - begin)
    return {f"{kind}_us": min(each) / places * 1e6 for kind, each in seconds.items()}


def node(root: str, cache: str | None, ranks: int, loaders: int) -> list[dict[str, Any]]:
    """Memory of the processes of a node, each of which has touched all that it holds.

    A rank opens the index and is forked into its loader processes, as torch does; these make the orders.
    """
    found, ready = _FORK.SimpleQueue(), _FORK.Barrier(ranks * (1 + loaders))
    processes = [_FORK.Process(target=_rank, args=(root, cache, loaders, ready, found)) for _ in range(ranks)]
    for process in processes:
        process.start()
    rows = [found.get() for _ in range(ranks * (1 + loaders))]
    for process in processes:
        process.join()
    return rows


def _rank(root: str, cache: str | None, loaders: int, ready: Any, found: Any) -> None:
    source = _opened(root, cache)
    _touch_table(source)
    processes = [_FORK.Process(target=_loader, args=(source, ready, found)) for _ in range(loaders)]
    for process in processes:
        process.start()
    _measure("rank", ready, found)
    for process in processes:
        process.join()


def _loader(source: WeightedSource, ready: Any, found: Any) -> None:
    _touch_table(source)
    for epoch in range(EPOCHS):
        _touch(source.order(epoch, 8))
    _measure("loader", ready, found)


def _measure(kind: str, ready: Any, found: Any) -> None:
    ready.wait()  # all have touched everything
    row = {"kind": kind, **memory_mb()}
    ready.wait()  # and none has ended
    found.put(row)


def main() -> None:
    """Do what is asked, in a fresh process."""
    asked = json.loads(sys.argv[1])
    permutation(1, 10)  # loads a part of numpy, which is not to be counted
    what = {"open": open_index, "orders": make_orders, "places": time_places, "node": node}[asked.pop("what")]
    print(json.dumps(what(**asked)))


if __name__ == "__main__":
    main()
