"""A checkpoint whose files are not as they were written: it is named, and the one before is taken."""

from __future__ import annotations

import hashlib
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.drill.job import Job
from benchmarks.drill.report import Row
from benchmarks.drill.setting import SAVE_EVERY, Setting
from benchmarks.harness import say
from maskmatch_scale.errors import RESUMABLE

STEPS = 6 * SAVE_EVERY
_STOP_AFTER = 2 * SAVE_EVERY + 1


def change_byte(file: Path, draws: random.Random) -> None:
    """Change one byte, at a drawn place."""
    content = bytearray(file.read_bytes())
    content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
    file.write_bytes(content)


def cut_off(file: Path, draws: random.Random) -> None:
    """Cut a file off at a drawn place."""
    with file.open("r+b") as opened:
        opened.truncate(draws.randrange(file.stat().st_size))


def remove(file: Path, draws: random.Random) -> None:
    """Remove a file."""
    file.unlink()


Damage = Callable[[Path, random.Random], None]
CASES: tuple[tuple[str, Damage, str], ...] = (
    ("a byte of a part is changed", change_byte, "part-*.safetensors"),
    ("a part is cut off", cut_off, "part-*.safetensors"),
    ("a part is missing", remove, "part-*.safetensors"),
    ("a byte of the index is changed", change_byte, "index.json"),
    ("the index is missing", remove, "index.json"),
    ("a byte of the stream's state is changed", change_byte, "stream.json"),
)


def run(setting: Setting) -> Iterator[Row]:
    """Stop a job, damage its newest checkpoint in a copy for each case, and let the copies finish."""
    setting.reference(STEPS)
    draws = setting.random("damage")
    setting.now = "damage: a job to be damaged"
    job = stopped_job(setting, "damage")
    for number, (name, damage, files) in enumerate(CASES[:1] if setting.short else CASES):
        setting.now = f"damage: case {number + 1} of {len(CASES)}"
        copy = job.copy(setting.work / f"damage-{number}")
        newest, before = _newest_two(copy)
        damage(draws.choice(sorted(newest.glob(files))), draws)
        done = copy.finish(setting.plain)
        starts = {note["start"] for note in done.notes("begins")}
        right = set(done.codes) == {0} and starts == {_step(before)} and newest.name in done.printed
        if not right:
            say(f"damage: {name}: began after {starts}:\n{done.printed[-3000:]}")
        yield Row("damage", name, 1, int(right), **setting.losses(copy, STEPS))
    if not setting.short:
        yield _all_damaged(setting, job, draws)


def stopped_job(setting: Setting, name: str) -> Job:
    """A job of `STEPS` steps that SIGTERM has stopped after a third of them or more.

    Raises:
        RuntimeError: it did not stop with a checkpoint and the exit code for it.
    """
    job = setting.job(name, STEPS)
    session = job.start(setting.plain)
    session.wait_for(lambda: session.steps() >= _STOP_AFTER)
    session.signal(signal.SIGTERM, session.ranks().values())
    if set(session.end()) != {RESUMABLE}:
        raise RuntimeError(f"{name}: stopped by SIGTERM, exit codes {session.codes}:\n{session.printed[-3000:]}")
    return job


def _all_damaged(setting: Setting, job: Job, draws: random.Random) -> Row:
    """With no whole checkpoint left the run is refused, and its folder is as it was."""
    copy = job.copy(setting.work / "damage-all")
    folders = sorted(copy.run.glob("checkpoints/step-*"))
    for folder in folders:
        change_byte(draws.choice(sorted(folder.glob("part-*.safetensors"))), draws)
    was = contents(copy.run)
    done = copy.finish(setting.plain)
    right = set(done.codes) == {2} and all(folder.name in done.printed for folder in folders)
    right = right and contents(copy.run) == was and "Traceback" not in done.printed
    if not right:
        say(f"damage: all: exit codes {done.codes}:\n{done.printed[-3000:]}")
    return Row("damage", "all checkpoints are damaged", len(folders), len(folders) * right, outlived=done.outlived,
               note="refused, exit code 2")  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files of a folder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _newest_two(job: Job) -> tuple[Path, Path]:
    before, newest = sorted(job.run.glob("checkpoints/step-*"))[-2:]
    return newest, before


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))
