"""The command line: ``python -m benchmarks.drill --out FILE.json [--kills 50] [--seed N]``."""

from __future__ import annotations

import argparse
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NoReturn

from benchmarks.drill import damage, disk, elastic, folder, kills, network, signals
from benchmarks.drill.job import LAUNCHERS, PRELOADED, left_over
from benchmarks.drill.report import Row, earlier_rows, write_report
from benchmarks.drill.setting import Setting
from benchmarks.harness import check_out, say
from benchmarks.small_runs import write_samples
from tests.data.faulty_server import FaultyServer

PHASES: Mapping[str, Callable[[Setting], Iterator[Row]]] = {
    "kill": kills.run,
    "signal": signals.run,
    "elastic": elastic.run,
    "damage": damage.run,
    "disk": disk.run,
    "network": network.run,
    "folder": folder.run,
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line; prints the reason and exits with 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.drill",
        description="Starts real runs of two ranks under real launchers, kills, stops, moves, damages and cuts them "
        "off, lets them go on, and compares them with a run that nothing happened to.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.json", help="results; a .md is written beside it. Rows of "
        "other phases that it has already are kept")  # fmt: skip
    add("--kills", type=int, default=50, help="kills of one job; default 50")
    add("--seed", type=int, default=0, help="of everything random; default 0")
    add("--phases", nargs="+", default=list(PHASES), choices=list(PHASES), help="default all")
    add(
        "--launchers",
        nargs="+",
        default=list(LAUNCHERS),
        choices=[*LAUNCHERS, PRELOADED],
        help="that take turns; default all",
    )
    add("--quick", action="store_true", help="sessions whose launcher does not matter start by fork, in a second")
    add("--short", action="store_true", help="only the first cases of each phase")
    add("--work", type=Path, metavar="FOLDER", help="keep the runs here, in a new folder; default: a temporary one")
    options = parser.parse_args(arguments)
    try:
        check_out(options.out)
    except ValueError as error:
        parser.error(str(error))
    if options.kills < 1:
        parser.error(f"--kills {options.kills}: at least 1")
    if options.work is not None and options.work.exists():
        parser.error(f"--work: {options.work} exists; name a new folder")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the phases, and write each row as it comes; 1 if something was lost, or a process is left at the end."""
    options = parse(arguments)
    rows = earlier_rows(options.out, options.phases)
    with nullcontext(options.work) if options.work else tempfile.TemporaryDirectory() as place:
        work = Path(place).resolve()
        write_samples(work / "shards")
        with FaultyServer(work / "shards") as server:
            plain = PRELOADED if options.quick else "none"
            setting = Setting(work, options.seed, options.kills, server, tuple(options.launchers), plain, options.short)
            with _a_line_a_minute(setting):
                try:
                    for phase in options.phases:
                        for row in PHASES[phase](setting):
                            rows.append(row)
                            say(f"{row.phase}: {row.case}: {'met' if row.met else 'NOT MET'} {row.skipped}")
                            rows.sort(key=lambda row: list(PHASES).index(row.phase))
                            write_report(options.out, rows, options.seed)
                finally:
                    left = _end_what_is_left(work)
    if left:
        say(f"{left} processes had not ended")
    print(options.out.with_suffix(".md").read_text(encoding="utf-8"))
    return int(left > 0 or not all(row.met for row in rows))


def _end(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def _end_what_is_left(work: Path) -> int:
    left = left_over(work)
    for process in left:
        process.kill()
    return len(left)


@contextmanager
def _a_line_a_minute(setting: Setting) -> Generator[None, None, None]:
    ended, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(60.0):
            say(f"{(time.monotonic() - began) / 60:.0f} min: {setting.now}")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)  # what was started is ended on the way out
    raise SystemExit(main())
