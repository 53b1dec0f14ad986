"""Writes the report on a run that is still going on, in a process of its own: `python -m maskmatch_scale.record.live`.

Decision: docs/decisions/0053-report-reloads-itself.md.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from maskmatch_scale.record.report import write_report


def main(arguments: Sequence[str]) -> int:
    """Write the report, and print the CPU seconds that it took.

    Args:
        arguments: run directory, and after how many seconds this is called again, a whole number.

    Returns:
        The exit code.
    """
    run, pause_s = arguments
    os.nice(10)  # the loader processes need the cores more
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no half-written file is left
    write_report([Path(run)], live_s=int(pause_s))
    sys.stdout.write(f"{time.process_time():.3f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
