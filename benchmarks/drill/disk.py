"""A disk that is full when a checkpoint is due: training goes on, and saves go on when there is space again."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.drill.job import Job, Session
from benchmarks.drill.report import Row
from benchmarks.drill.setting import SAVE_EVERY, Setting
from benchmarks.harness import say

STEPS = 10 * SAVE_EVERY
_SPACE = 8
"""Size of the disk, in checkpoints, above 4 MiB."""

_FAILED = re.compile(r"^step (\d+): the checkpoint could not be written", re.MULTILINE)


class NoDiskError(Exception):
    """A small disk cannot be had here."""


@dataclass
class SmallDisk:
    """A tmpfs of a few MB."""

    folder: Path

    def fill(self, left: int) -> None:
        """Fill it until about ``left`` bytes are free."""
        status = os.statvfs(self.folder)
        size = max(0, status.f_bavail * status.f_frsize - left)
        with self._ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)

    def free(self) -> None:
        """Give the space back."""
        self._ballast.unlink()

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"


@contextmanager
def small_disk(folder: Path, size: int) -> Generator[SmallDisk, None, None]:
    """Mount a tmpfs while the body runs.

    Args:
        folder: where; it is made.
        size: bytes.

    Raises:
        NoDiskError: with the reason.
    """
    folder.mkdir(parents=True)
    if os.geteuid() != 0:
        raise NoDiskError("only root can mount a tmpfs")
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        raise NoDiskError(f"a tmpfs cannot be mounted: {' '.join(mounted.stderr.split())}")
    try:
        yield SmallDisk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def run(setting: Setting) -> Iterator[Row]:
    """A disk that leaves room for records, then one that leaves none, then one that stays full."""
    size = sum(file.stat().st_size for file in setting.reference(STEPS).checkpoint(SAVE_EVERY).iterdir())
    cases: tuple[tuple[str, int, Callable[[Setting, Job, SmallDisk, int], int]], ...] = (
        ("full for two checkpoints, with room for records", size // 2, _for_a_while),
        ("full to the last byte for two checkpoints", 0, _for_a_while),
        ("full until the run stops", size // 2, _until_it_stops),
    )
    for number, (name, left, case) in enumerate(cases[:1] if setting.short else cases):
        setting.now = f"disk: {name}"
        folder = setting.work / f"disk-{number}-mounted"
        try:
            with small_disk(folder, (4 << 20) + _SPACE * size) as disk:
                limit = 2 if case is _until_it_stops else 1000
                job = setting.job(f"disk-{number}", STEPS, {"run": {"max_failed_saves": limit}}, run=folder / "run")
                right = case(setting, job, disk, left)
                yield Row("disk", name, 1, right, **setting.losses(job, STEPS))
        except NoDiskError as reason:
            yield Row("disk", name, 0, 0, skipped=str(reason))


def _fill(job: Job, session: Session, disk: SmallDisk, left: int) -> None:
    """Fill the disk when the first checkpoint is complete."""
    session.wait_for(lambda: (job.checkpoint(SAVE_EVERY) / "index.json").exists())
    disk.fill(left)


def _for_a_while(setting: Setting, job: Job, disk: SmallDisk, left: int) -> int:
    session = job.start(setting.plain)
    _fill(job, session, disk, left)
    # Said on stderr: on a full disk there may be no record of it.
    session.wait_for(lambda: len(set(_FAILED.findall(session.printed))) >= 2)
    disk.free()
    session.end()
    counted = sum("error" in record for record in job.records("checkpoint"))
    right = (
        counted >= 2
        and "Traceback" not in session.printed
        and set(session.codes) == {0}
        and job.checkpoint(STEPS).is_dir()
    )
    if not right:
        say(f"disk: exit codes {session.codes}, {counted} failed saves recorded:\n{session.printed[-3000:]}")
    return int(right)


def _until_it_stops(setting: Setting, job: Job, disk: SmallDisk, left: int) -> int:
    stopped = job.start(setting.plain)
    _fill(job, stopped, disk, left)
    stopped.end()
    disk.free()
    went_on = job.finish(setting.plain)
    said = "run.max_failed_saves" in stopped.printed and "Traceback" not in stopped.printed
    right = said and set(stopped.codes) == {1} and set(went_on.codes) == {0}
    if not right:
        say(f"disk: exit codes {stopped.codes}, then {went_on.codes}:\n{stopped.printed[-3000:]}")
    return int(right)
