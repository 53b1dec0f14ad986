"""Two runs in one folder: the second is refused, and a dead one's folder is taken over."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator

from benchmarks.drill.damage import contents
from benchmarks.drill.report import Row
from benchmarks.drill.setting import SAVE_EVERY, Setting
from benchmarks.harness import say

STEPS = 8 * SAVE_EVERY


def run(setting: Setting) -> Iterator[Row]:
    """While a job trains, or is stopped by SIGSTOP, start it a second time; then kill it, and let it finish."""
    setting.reference(STEPS)
    job = setting.job("folder", STEPS)
    setting.now = "folder"
    first = job.start(setting.plain)
    first.wait_for(lambda: first.steps() >= 1)
    owner = first.ranks()[0]
    first.signal(signal.SIGSTOP, first.processes())  # so that nothing but the second could change the folder
    was = contents(job.run)
    refused = 0
    attempts = ("auto",) if setting.short else ("auto", None)
    for number, resume in enumerate(attempts):
        second = setting.job(f"folder-{number}", STEPS, run=job.run).finish(setting.plain, resume=resume)
        named = str(owner.pid) in second.printed and socket.gethostname() in second.printed
        right = set(second.codes) == {2} and named and contents(job.run) == was and "Traceback" not in second.printed
        if not right:
            say(f"folder: --resume {resume}: exit codes {second.codes}:\n{second.printed[-3000:]}")
        refused += right
    first.signal(signal.SIGCONT, first.processes())
    went_on = first.wait_for(lambda: first.steps() >= SAVE_EVERY + 1) and first.running
    first.signal(signal.SIGKILL, first.processes())
    first.kill()
    after = job.finish(setting.plain)
    if set(after.codes) != {0}:
        say(f"folder: taken over: exit codes {after.codes}:\n{after.printed[-3000:]}")
    taken_over = went_on and set(after.codes) == {0}
    yield Row(
        "folder", "a second run, and after a dead one", len(attempts) + 1, refused + taken_over,
        note="refused, exit code 2, nothing changed; taken over", **setting.losses(job, STEPS),
    )  # fmt: skip
