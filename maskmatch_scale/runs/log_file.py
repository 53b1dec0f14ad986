"""The log file of a rank. It holds no passwords and tokens of addresses, and a full disk does not end the run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from maskmatch_scale.files import disk_fault, writing
from maskmatch_scale.redact import redacted


class LogFile(logging.Handler):
    """Appends to a file, a record at once. What cannot be written is lost; it is counted, and said once on stderr.

    Decision: docs/decisions/0049-secrets-and-disks.md.

    Args:
        path: the file.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._path = path
        # Without a buffer, which would try again, and fail again, when it is closed.
        self._file = path.open("ab", buffering=0)
        self.lost = 0
        """Records that could not be written since the last one that was."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            text = redacted(self.format(record)) + "\n"
            if self.lost:
                text = f"\n({self.lost} records before this one could not be written)\n{text}"
            self._write(text.encode())
        except OSError as error:
            if not self.lost:
                line = disk_fault(error) or str(error)
                sys.stderr.write(f"maskmatch: warning: {line}; what is logged meanwhile is lost\n")
            self.lost += 1
        except Exception:
            self.handleError(record)
        else:
            self.lost = 0

    def _write(self, content: bytes) -> None:
        with writing(self._path):
            while content:
                content = content[self._file.write(content) or 0 :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()
