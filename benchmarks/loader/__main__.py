"""The command line: ``python -m benchmarks.loader --out FILE.json``."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT, check_out, describe_machine, say, write_json
from benchmarks.loader.measure import LINK_BYTES_PER_S, PEERS, Variant, measure_rates, measure_resume
from benchmarks.loader.photos import PhotoSource
from benchmarks.loader.processes import FailedError, running
from benchmarks.loader.report import ROW, draw, judge, page
from benchmarks.loader.server import serving
from benchmarks.loader.simulated import write_simulated_index
from benchmarks.loader.task import PREFETCH, SAMPLES_PER_SHARD, Task
from maskmatch_scale.data.writing import write_shards

EXAMPLES = """examples:
  python -m benchmarks.loader --out benchmarks/results/loader.json --other-python .venv/peers/bin/python
  python -m benchmarks.loader --out /tmp/quick.json --images 500 --rounds 2 --long-run 2000 --large-index 10000
"""

SOURCES = ("benchmarks/loader", "benchmarks/harness.py", "maskmatch_scale/data", "maskmatch_scale/recipe")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line; prints the reason and exits with 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.loader",
        description="Times our training batches against the bare decoder and three other loaders on the same JPEGs, in "
        "turns; measures memory over a long run, resuming, the size of the state, and a large index.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.json", help="results; a .md and a .png are written beside it")
    add("--other-python", metavar="PYTHON", help="one that has litdata and mosaicml-streaming; default this one")
    add("--data", type=Path, metavar="FOLDER", help="where the images are written, or lie from an earlier run")
    add("--images", type=int, default=2500, metavar="N", help="default %(default)s")
    add("--width", type=int, default=640, metavar="PX", help="of an image; height is 3/4 of it; default %(default)s")
    add("--crop", type=int, default=512, metavar="PX", help="side of a view; default %(default)s")
    add("--batch", type=int, default=8, metavar="N", help="default %(default)s")
    add("--window", type=int, default=1000, metavar="N", help="samples shuffled with each other; default %(default)s")
    add("--samples", type=int, default=1600, metavar="N", help="of a loader in a round; default %(default)s")
    add("--rounds", type=int, default=5, metavar="N", help="default %(default)s")
    add("--processes", type=int, default=2, metavar="N", help="loader processes; default %(default)s")
    add("--long-run", type=int, default=100_000, metavar="N", help="small samples of it; default %(default)s")
    add("--large-index", type=int, default=1_000_000, metavar="N", help="shards of it; default %(default)s")
    add("--state-shards", type=int, default=100_000, metavar="N", help="shards, for the state; default %(default)s")
    add("--ranks", type=int, default=512, metavar="N", help="of the job whose state is measured; default %(default)s")
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> None:
    least = {"images": 16, "width": 32, "crop": 16, "batch": 1, "window": 1, "samples": options.batch, "rounds": 1}
    least |= {"processes": 1, "long_run": 1, "large_index": 1, "state_shards": 10_001, "ranks": 2}
    for name, bound in least.items():
        if getattr(options, name) < bound:
            raise ValueError(f"--{name.replace('_', '-')}: {getattr(options, name)}; it must be at least {bound}")
    if options.other_python and shutil.which(options.other_python) is None:
        raise ValueError(f"--other-python: {options.other_python} cannot be run")
    check_out(options.out)


def _prepare_peers(task: Task, python: str) -> tuple[dict[str, str | None], dict[str, str]]:
    """Write the JPEGs in the peers' formats; the versions of their environment, and why a peer is left out."""
    skipped: dict[str, str] = {}
    with running(python) as worker:
        names = (*PEERS.values(), "torch", "torchvision", "numpy", "simplejpeg")
        versions: dict[str, str | None] = worker.ask("versions", names=names)
    for name, distribution in PEERS.items():
        if versions[distribution] is None:
            skipped[name] = (
                f"{distribution} is not installed in {'--other-python' if python != sys.executable else 'here'}"
            )
            continue
        with running(python) as worker:
            try:
                if not (Path(task.peers) / {"litdata": "litdata", "streaming": "mds"}[name]).is_dir():
                    worker.ask("write", name=name, shards=task.shards, folder=task.peers)
            except FailedError as error:
                skipped[name] = str(error)
    return versions, skipped


def run(options: argparse.Namespace, folder: Path) -> None:
    """Measure everything in ``folder`` and write JSON, Markdown and PNG."""
    machine = describe_machine(torch.device("cpu"), SOURCES)
    photos = PhotoSource(options.images, options.width, options.width * 3 // 4)
    small = PhotoSource(min(1000, options.images), 160, 120)
    index = write_shards(photos, folder / "photos", samples_per_shard=SAMPLES_PER_SHARD, progress=False)
    write_shards(small, folder / "small", samples_per_shard=8, progress=False)
    files = [shard.file for shard in index.stream("unlabelled").shards]
    say(f"loader: {options.images} images in {len(files)} shards")
    task = Task(
        root=str(folder / "photos"),
        shards=tuple(str(folder / "photos" / file) for file in files),
        peers=str(folder / "peers"),
        cache=str(folder / "cache"),
        batch=options.batch,
        crop_px=options.crop,
        window=options.window,
        workers=options.processes,
    )
    versions, skipped = _prepare_peers(task, options.other_python or sys.executable)
    begin = time.perf_counter()
    result: dict[str, Any] = {}
    with serving(folder / "photos", ROOT) as url, serving(folder / "photos", ROOT, LINK_BYTES_PER_S) as slow_url:
        result["rows"], step_s = measure_rates(task, url, options, skipped)
        many = folder / "photos" / f"many-{options.state_shards}.json"
        write_simulated_index(many, options.state_shards, index.stream("unlabelled").shards)
        result["resume"] = measure_resume(task, url, slow_url, str(many), options)
    say("loader: resume")
    with running(sys.executable) as worker:
        long = replace(task, root=str(folder / "small"), crop_px=96, window=32)
        result["memory"] = worker.ask("memory", task=asdict(long), samples=options.long_run, points=120)
    say("loader: memory")
    with running(sys.executable) as worker:
        state = {"shards": options.state_shards, "ranks": options.ranks, "changes": 8}
        result["state"] = worker.ask("state_bytes", task=asdict(task), **state)
    large = folder / "large.json"
    write_simulated_index(large, options.large_index)
    with running(sys.executable) as worker:
        result["index"] = [worker.ask("index", task=asdict(task), path=str(large))]
    large.unlink()
    result["targets"] = judge(result, options)
    names = ("images", "width", "crop", "batch", "window", "samples", "rounds", "processes", "long_run")
    jpeg_kb = sum((folder / "photos" / file).stat().st_size for file in files) / options.images / 1e3
    machine |= {name: getattr(options, name) for name in names} | {"jpeg_kb": round(jpeg_kb, 1)}
    machine |= {"prefetch": PREFETCH, "step_ms": round(step_s * 1e3, 2), "seconds": round(time.perf_counter() - begin)}
    machine["clock"] = "CPU seconds of the consumer, its loader processes and theirs; the least over the rounds"
    machine |= {"threads": 1, "load_at_end": round(os.getloadavg()[0], 2)}
    machine["peers"] = {key: value for key, value in versions.items() if value is not None}
    for name, reason in skipped.items():
        for processes in (0, options.processes):
            where = Variant(name, processes)
            result["rows"].append(
                dict.fromkeys(ROW)
                | {"variant": name, "over": "local", "processes": processes, "label": where.label}
                | {"environment": "peers" if options.other_python else "main", "skipped": reason}
            )
    _write(options.out, machine, result)


def _write(out: Path, machine: Mapping[str, Any], result: dict[str, Any]) -> None:
    rows = result.pop("rows")
    write_json(out, machine, rows, **result)
    out.with_suffix(".md").write_text(page(machine, rows, result), encoding="utf-8")
    draw([row for row in rows if "skipped" not in row], result["memory"]).savefig(out.with_suffix(".png"), dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the images, measure, and write JSON, Markdown and PNG."""
    options = parse(arguments)
    try:
        _check(options)
    except ValueError as error:
        say(f"loader: {error}")
        return 2
    with nullcontext(options.data) if options.data else tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder).resolve())
    say(f"loader: wrote {options.out}, and .md and .png beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
