"""Hosts and their slots, as a file of the deepspeed launcher lists them: `gpu-a slots=8`, one a line, `#` comments."""

from __future__ import annotations

import re
from pathlib import Path

from maskmatch_scale.errors import UserError

_FORM = "each line is `HOST slots=NUMBER`"


def read_hostfile(path: Path) -> dict[str, int]:
    """Read a hostfile.

    Returns:
        The number of slots (ranks) of each host, in the order of the file, which is that of the ranks.

    Raises:
        UserError: it cannot be read or has a mistake; the message names file and line, and what to do.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"--hosts {path}: cannot be read ({reason}); {_FORM}") from None
    slots: dict[str, int] = {}
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        where = f"{path}:{number}"
        match = re.fullmatch(r"(\S+)\s+slots=(\S+)(\s+#.*)?", text)
        if match is None:
            raise UserError(f"{where}: {text!r}: {_FORM}")
        host, count = match[1], match[2]
        if not re.fullmatch(r"[0-9]+", count) or int(count) == 0:
            raise UserError(f"{where}: slots={count} of {host}: give the number of its GPUs, 1 or more")
        if not re.fullmatch(r"[A-Za-z0-9._:@%-]+", host) or host.startswith("-"):
            raise UserError(f"{where}: {host!r} is no name of a host; {_FORM}")
        if host in seen:
            raise UserError(f"{where}: {host} is in line {seen[host]} already; list each host once")
        slots[host], seen[host] = int(count), number
    if not slots:
        raise UserError(f"--hosts {path}: it lists no host; {_FORM}")
    return slots
