"""The command line: ``python -m benchmarks.drill_hosts --out FILE.json``."""

from __future__ import annotations

import argparse
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.drill_hosts import collectives, cuts, links
from benchmarks.drill_hosts.hosts import why_no_hosts
from benchmarks.drill_hosts.report import earlier, write_report
from benchmarks.harness import check_out, say
from benchmarks.small_runs import write_samples

PHASES: Mapping[str, Callable[..., Iterator[Any]]] = {
    "cuts": cuts.run,
    "steps": links.run,
    "collectives": collectives.run,
}
TOOLS = ("pdsh", "tc", "nft", "pgrep", "taskset")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line; prints the reason and exits with 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.drill_hosts",
        description="Trains over two hosts of namespaces under real launchers, cuts one off in mid-run, and measures "
        "what slow and lossy links cost. Needs root; without it nothing is done, and the reason is said.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.json", help="results; a .md is written beside it. Rows of "
        "other phases that it has already are kept")  # fmt: skip
    add("--phases", nargs="+", default=list(PHASES), choices=list(PHASES), help="default all")
    add("--short", action="store_true", help="only a few cases of each phase")
    add("--work", type=Path, metavar="FOLDER", help="keep the runs here, in a new folder; default: a temporary one")
    options = parser.parse_args(arguments)
    try:
        check_out(options.out)
    except ValueError as error:
        parser.error(str(error))
    if options.work is not None and options.work.exists():
        parser.error(f"--work: {options.work} exists; name a new folder")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the phases, and write each row as it comes; 1 if something is not as it should be."""
    options = parse(arguments)
    reason = why_no_hosts(*TOOLS)
    if reason is not None:
        say(f"skipped: {reason}")
        return 0
    results = earlier(options.out, options.phases)
    with nullcontext(options.work) if options.work else tempfile.TemporaryDirectory() as place:
        work = Path(place).resolve()
        write_samples(work / "shards")
        for phase in options.phases:
            for row in PHASES[phase](work, work / "shards", short=options.short):
                getattr(results, phase).append(row)
                say(f"{phase}: {row.shown()}")
                write_report(options.out, results)
    print(options.out.with_suffix(".md").read_text(encoding="utf-8"))
    return int(not all(row.met for row in results.cuts))


def _end(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)  # what was started is ended on the way out
    raise SystemExit(main())
