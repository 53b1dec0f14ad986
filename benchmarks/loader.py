"""The training stream against the bare decoder, webdataset, litdata and mosaicml-streaming; its memory, its state.

python -m benchmarks.loader --out benchmarks/results/loader.json --other-python .venv/peers/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from matplotlib.figure import Figure

from benchmarks._loader_data import PhotoSource, serving
from benchmarks._loader_stream import SAMPLES_PER_SHARD, write_simulated_index
from benchmarks._loader_variants import PREFETCH, Task
from benchmarks.harness import ROOT, check_out, describe_machine, markdown, markdown_table, write_json
from maskmatch_scale.data.writing import write_shards

EXAMPLES = """examples:
  python -m benchmarks.loader --out benchmarks/results/loader.json --other-python .venv/peers/bin/python
  python -m benchmarks.loader --out /tmp/quick.json --images 500 --rounds 2 --long-run 2000 --large-index 10000
"""
SOURCES = (
    *(f"benchmarks/{name}.py" for name in ("loader", "_loader_data", "_loader_stream", "_loader_variants")),
    *("benchmarks/_loader_worker.py", "benchmarks/harness.py", "maskmatch_scale/data", "maskmatch_scale/recipe.py"),
)
PEERS = {"litdata": "litdata", "streaming": "mosaicml-streaming"}
"""Variants that may need an interpreter of their own, and their distributions."""
ROW = ("variant", "over", "processes", "samples_per_core_s", "of_limit", "samples_per_s", "waiting", "waiting_median")
STEP_SHARE = 0.75
"""A simulated training step, as a share of the bare decoder's time for a batch: two loader processes can keep up."""
WARM_BATCHES = 10
ANSWER_S = 240
"""Seconds after which a loader counts as hung."""
HELD_MB = 1.0
"""Growth in 10,000 samples, of the second half of the long run, up to which memory counts as flat."""
LINK_BYTES_PER_S = 25e6


@dataclass(frozen=True)
class Variant:
    """One loader in one setting: a row of the result."""

    name: str
    processes: int
    over: str = "local"
    """Where its shards are: local, http (nothing cached yet), http, cached."""
    environment: str = "main"

    @property
    def label(self) -> str:
        """Name in the picture."""
        where = "" if self.over == "local" else f", {self.over}"
        other = " in the peers' environment" if self.name == "bare" and self.environment != "main" else ""
        return (
            f"{self.name}{other}, {self.processes} processes{where}" if self.processes else f"{self.name}{other}{where}"
        )


class FailedError(RuntimeError):
    """A worker could not do what it was asked."""


class Worker:
    """A process that measures: `benchmarks._loader_worker`."""

    def __init__(self, python: str) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks._loader_worker"],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, what: str, **request: Any) -> Any:
        """Raises FailedError with what went wrong."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"what": what, **request}) + "\n")
            self.process.stdin.flush()
            ready, _, _ = select.select([self.process.stdout], [], [], ANSWER_S)
            if not ready:
                raise FailedError(f"no answer in {ANSWER_S} s")
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise FailedError("the process ended")
        answer = json.loads(line)
        if "error" in answer:
            raise FailedError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """End it, and wait until it has ended."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            for process in (*psutil.Process(self.process.pid).children(recursive=True), self.process):
                process.kill()
            self.process.wait()


@contextmanager
def _worker(python: str) -> Iterator[Worker]:
    worker = Worker(python)
    try:
        yield worker
    finally:
        worker.close()


def measure_rates(
    task: Task, url: str, options: argparse.Namespace, skipped: dict[str, str]
) -> tuple[list[dict[str, Any]], float]:
    """All loaders in turns, in an order drawn anew each round; their rows, and the seconds of the simulated step."""
    here, peers = sys.executable, options.other_python or sys.executable
    apart = options.other_python is not None
    counts = [0, options.processes]
    variants = [Variant(name, n) for name in ("bare", "ours", "webdataset") for n in counts]
    variants += [Variant("ours", options.processes, "http"), Variant("ours", options.processes, "http, cached")]
    variants += [Variant("webdataset", options.processes, "http")]
    theirs = [name for name in PEERS if name not in skipped]
    variants += [Variant(name, n, environment="peers" if apart else "main") for name in theirs for n in counts]
    if apart and theirs:
        variants += [Variant("bare", n, environment="peers") for n in counts]
    remote = replace(task, root=url, shards=tuple(f"{url}/{Path(shard).name}" for shard in task.shards))
    found: dict[Variant, list[dict[str, Any]]] = {variant: [] for variant in variants}
    count = options.samples // task.batch
    step_s = 0.0
    with ExitStack() as stack:
        # One process a loader and number of processes: mosaicml-streaming hangs where it is forked after it has run.
        workers: dict[tuple[str, str, int], Worker] = {}
        for variant in variants:
            key = (variant.name, variant.environment, variant.processes)
            if key not in workers:
                workers[key] = stack.enter_context(_worker(peers if variant.environment == "peers" else here))
        order = random.Random(0)
        for round_ in range(options.rounds + 1):  # the first is a warm-up, but for the length of the step
            for variant in [variants[0], *order.sample(variants[1:], len(variants) - 1)]:
                if variant.name in skipped:
                    continue
                cold = variant.over == "http" and variant.name == "ours"
                setting = replace(remote if variant.over != "local" else task, workers=variant.processes, cold=cold)
                request = {"variant": variant.name, "warm": 0 if cold else WARM_BATCHES, "step_s": step_s}
                request |= {"count": count if round_ else max(1, count // 8)}
                request |= {"paced": max(1, count // 5) if variant.processes and round_ else 0}
                try:
                    result = workers[variant.name, variant.environment, variant.processes].ask(
                        "measure", task=asdict(setting), **request
                    )
                except FailedError as error:
                    if variant.name not in PEERS:
                        raise
                    skipped[variant.name] = str(error)
                    continue
                if round_:
                    found[variant].append(result)
                elif variant == variants[0]:
                    step_s = STEP_SHARE * result["cpu_s"] / request["count"]
            _say(f"round {round_} of {options.rounds}")
    samples = count * task.batch
    rows = [_row(variant, results, samples) for variant, results in found.items() if variant.name not in skipped]
    limits = {(r["environment"], r["processes"]): r["samples_per_core_s"] for r in rows if r["variant"] == "bare"}
    for row in rows:
        row["of_limit"] = row["samples_per_core_s"] / limits[row["environment"], row["processes"]]
    return rows, step_s


def _row(variant: Variant, results: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any]:
    cpu, wall = [result["cpu_s"] for result in results], [result["wall_s"] for result in results]
    waiting = [result["waiting"] for result in results if result["waiting"] is not None]
    return {
        "variant": variant.name,
        "over": variant.over,
        "processes": variant.processes,
        "environment": variant.environment,
        "label": variant.label,
        "samples_per_core_s": samples / min(cpu),
        "samples_per_core_s_median": samples / median(cpu),
        "samples_per_s": samples / min(wall),
        "samples_per_s_median": samples / median(wall),
        "waiting": min(waiting) if waiting else None,
        "waiting_median": median(waiting) if waiting else None,
        "cpu_s": cpu,
        "wall_s": wall,
    }


def measure_resume(
    task: Task, url: str, slow_url: str, large: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Seconds to the first batch: local and HTTP, at the start and within an epoch, and with many shards."""
    middle = options.images // 2 // task.batch
    many = options.state_shards * SAMPLES_PER_SHARD // 2 // task.batch
    remote = replace(task, root=url, shards=(f"{url}/{Path(task.shards[0]).name}",), cold=True)
    slow = replace(remote, root=slow_url, shards=(f"{slow_url}/{Path(task.shards[0]).name}",))
    cases = [("local", task, step) for step in (0, middle)] + [("http", remote, step) for step in (0, middle)]
    cases += [(f"http, {LINK_BYTES_PER_S / 1e6:.0f} MB/s", slow, middle)]
    cases += [(f"local, {options.state_shards} shards", replace(task, root=large), many)]
    rows = []
    with _worker(sys.executable) as worker:
        for where, setting, step in cases:
            repeats = options.rounds if setting is not slow else min(3, options.rounds)
            found = worker.ask("resume", task=asdict(setting), step=step, repeats=repeats)
            seconds = found["seconds"][1:] or found["seconds"]  # the first one imports
            shard = median(found["shard_seconds"]) if found["shard_seconds"] else 0.0
            row = {"over": where, "step": step, "seconds_median": median(seconds), "seconds_max": max(seconds)}
            rows.append(row | {"shard_s": shard, "cost_s": median(seconds) - shard})
    return rows


def slope(rows: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """MB in 10,000 samples over the second half, by least squares, and its standard error."""
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
    """The targets, what was measured of each, and whether it is met; None where it could not be measured."""
    by = {(r["variant"], r["over"], r["processes"]): r for r in result["rows"] if r["environment"] == "main"}
    targets: list[dict[str, Any]] = []

    def add(target: str, value: float, most: float | None = None, least: float | None = None) -> None:
        met = (most is None or value <= most) and (least is None or value >= least)
        targets.append({"target": target, "bound": most if least is None else least, "measured": value, "met": met})

    n = options.processes
    for processes in (0, n):
        ours, plain = by["ours", "local", processes], by["webdataset", "local", processes]
        said = f"local shards, {processes} processes" if processes else "local shards, in the consumer's process"
        add(f"share of the bare limit a core, at least ({said})", ours["of_limit"], least=0.9)
        over = ours["samples_per_core_s"] / plain["samples_per_core_s"]
        add(f"samples/s a core over plain webdataset's, at least ({said})", over, least=1)
        over = ours["samples_per_s"] / plain["samples_per_s"]
        add(f"samples/s on the wall over plain webdataset's, at least ({said})", over, least=1)
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


def draw(rows: Sequence[Mapping[str, Any]], memory: Sequence[Mapping[str, float]]) -> Figure:
    """Left: samples a CPU second of every loader as a share of the bare limit; right: memory over a long run."""
    figure = Figure((14, 6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    shown = [row for row in rows if row["variant"] != "bare"]
    shown.sort(key=lambda row: (row["over"] != "local", row["processes"], -row["of_limit"]))
    places = range(len(shown))
    colours = ["#4477aa" if row["variant"] == "ours" else "#bbbbbb" for row in shown]
    left.barh(places, [row["of_limit"] for row in shown], color=colours, height=0.7)
    for place, row in zip(places, shown):
        waits = f", waits {row['waiting']:.0%}" if row["waiting"] is not None else ""
        text = f"{row['of_limit']:.2f} ({row['samples_per_core_s']:.0f}/s{waits})"
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        left.text(row["of_limit"] + 0.01, place, text, va="center", fontsize=8, bbox=ground)
    left.axvline(0.9, color="#cc3311", linewidth=1.5, zorder=1.5)
    left.set_yticks(places, [row["label"] for row in shown], fontsize=8)
    left.invert_yaxis()
    left.set_xlim(0, 1.45)
    left.set_xlabel("samples a CPU second as a share of the bare decode + augment limit (red: target)")
    right.plot([row["samples"] for row in memory], [row["pss_mb"] for row in memory], color="#4477aa")
    a, error = slope(memory)
    right.set_title(f"second half: {a:+.2f} ± {error:.2f} MB in 10,000 samples", fontsize=9)
    right.set_ylim(0, 1.15 * max(row["pss_mb"] for row in memory))
    right.set_xlabel("samples")
    right.set_ylabel("consumer and loader processes, PSS, 10⁶ bytes")
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line; prints the reason and exits with 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.loader",
        description="Times the training stream against the bare decoder and three other loaders on the same JPEGs, in "
        "turns; measures memory over a long run, continuing, the size of the state, and a large index.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.json", help="results; a .md and a .png are written beside it")
    add("--other-python", metavar="PYTHON", help="that has litdata and mosaicml-streaming; default this one")
    add("--data", type=Path, metavar="FOLDER", help="where the images are written, or lie from an earlier run")
    add("--images", type=int, default=2500, metavar="N", help="default %(default)s")
    add("--width", type=int, default=640, metavar="PX", help="of an image; height is 3/4 of it; default %(default)s")
    add("--crop", type=int, default=512, metavar="PX", help="side of a view; default %(default)s")
    add("--batch", type=int, default=8, metavar="N", help="default %(default)s")
    add("--window", type=int, default=1000, metavar="N", help="samples shuffled with each other; default %(default)s")
    add("--samples", type=int, default=1600, metavar="N", help="samples of a loader and round; default %(default)s")
    add("--rounds", type=int, default=5, metavar="N", help="default %(default)s")
    add("--processes", type=int, default=2, metavar="N", help="loader processes; default %(default)s")
    add(
        "--long-run",
        type=int,
        default=100_000,
        metavar="N",
        help="small samples; default %(default)s",
    )
    add("--large-index", type=int, default=1_000_000, metavar="N", help="shards of it; default %(default)s")
    add("--state-shards", type=int, default=100_000, metavar="N", help="of the state's index; default %(default)s")
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
    """Write the JPEGs in the peers' formats; the versions there, and why a peer is left out."""
    skipped: dict[str, str] = {}
    with _worker(python) as worker:
        names = (*PEERS.values(), "torch", "torchvision", "numpy", "simplejpeg")
        versions: dict[str, str | None] = worker.ask("versions", names=names)
    for name, distribution in PEERS.items():
        if versions[distribution] is None:
            skipped[name] = (
                f"{distribution} is not installed in {'--other-python' if python != sys.executable else 'here'}"
            )
            continue
        with _worker(python) as worker:
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
    _say(f"{options.images} images in {len(files)} shards")
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
    _say("resume")
    with _worker(sys.executable) as worker:
        long = replace(task, root=str(folder / "small"), crop_px=96, window=32)
        result["memory"] = worker.ask("memory", task=asdict(long), samples=options.long_run, points=120)
    _say("memory")
    with _worker(sys.executable) as worker:
        state = {"shards": options.state_shards, "ranks": options.ranks, "changes": 8}
        result["state"] = worker.ask("state_bytes", task=asdict(task), **state)
    large = folder / "large.json"
    write_simulated_index(large, options.large_index)
    with _worker(sys.executable) as worker:
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
    shown = [
        row | {"variant": f"{row['variant']} (peers)" if row["environment"] == "peers" else row["variant"]}
        for row in rows
    ]
    peers = ", ".join(f"{name} {version}" for name, version in machine["peers"].items())
    page = markdown("loader", {**machine, "peers": peers}, shown, ROW)
    for reason in sorted({f"{row['variant']} was left out: {row['skipped']}." for row in rows if "skipped" in row}):
        page += f"\n{reason}\n"
    a, error = slope(result["memory"])
    page += "\n## Targets\n\n" + markdown_table(result["targets"], ("target", "bound", "measured", "met"))
    columns = ("over", "step", "seconds_median", "seconds_max", "shard_s", "cost_s")
    page += "\n## Seconds to the first batch\n\n" + markdown_table(result["resume"], columns)
    page += "\n## State\n\n" + markdown_table(result["state"], ("shards", "ranks", "changes", "bytes"))
    page += "\n## Large index\n\n" + markdown_table(result["index"], tuple(result["index"][0]))
    page += f"\n## Memory\n\nOver the second half of {result['memory'][-1]['samples']} samples: "
    page += f"{a:+.2f} ± {error:.2f} MB in 10,000 samples.\n"
    out.with_suffix(".md").write_text(page, encoding="utf-8")
    draw([row for row in rows if "skipped" not in row], result["memory"]).savefig(out.with_suffix(".png"), dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the images, measure, and write JSON, Markdown and PNG."""
    options = parse(arguments)
    try:
        _check(options)
    except ValueError as error:
        print(f"loader: {error}", file=sys.stderr)
        return 2
    with nullcontext(options.data) if options.data else tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder).resolve())
    _say(f"wrote {options.out}, and .md and .png beside it")
    return 0


def _say(text: str) -> None:
    print(f"loader: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
