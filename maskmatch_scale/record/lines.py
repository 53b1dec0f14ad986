"""Files to which a run adds lines, such as `metrics.jsonl`. A full disk does not end the run: the lines wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from maskmatch_scale.files import append_lines, disk_fault


class LinesFile:
    """Appends lines to a file. Lines that cannot be written are kept in memory and tried again with the next ones.

    Whether a run goes on without room on its disk is decided where its checkpoints are written.

    Decision: docs/decisions/0049-secrets-and-disks.md.

    Args:
        path: the file; made, with its folder, when the first lines are added.
        say: tells the user when lines begin to wait, and when they have been written.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path = path
        self._say = say
        self._waiting: list[str] = []
        self.fault: str | None = None
        """Why lines wait: one line. None if none do."""

    @property
    def waiting(self) -> int:
        """Number of lines that are not in the file."""
        return len(self._waiting)

    def append(self, lines: Sequence[str] = ()) -> None:
        """Add lines; without lines, try those again that wait.

        Args:
            lines: without line breaks.
        """
        self._waiting += lines
        if not self._waiting:
            return
        before, self.fault = self.fault, None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_lines(self.path, self._waiting)
        except OSError as error:
            self.fault = disk_fault(error)
            if self.fault is None:
                raise
            if before is None:
                self._say(f"warning: {self.fault}; its lines wait in memory until they can be written")
        else:
            if before is not None:
                self._say(f"{self.path}: the {len(self._waiting)} lines that waited have been written")
            self._waiting.clear()
