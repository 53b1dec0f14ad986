"""Files that a shell command prints: ``pipe:COMMAND``."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import tempfile
from contextlib import suppress
from typing import IO

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.remote.transfer import FetchOptions, Transfer, TransferError
from maskmatch_scale.redact import PIPE, shown

_BLOCK = 1 << 20


def refuse_pipe(url: str, options: FetchOptions) -> None:
    """Refuse an address that is a command where commands may not run.

    Raises:
        DataError: it is one, and they may not.
    """
    if url.startswith(PIPE) and not options.allow_pipe:
        raise DataError(
            f"{shown(url)}: pipe: runs a shell command, which is off; data.allow_pipe=true allows it, "
            "if you trust whoever wrote the index"
        )


def get(transfer: Transfer) -> None:
    """Run the command once and take what it prints, from the first byte.

    Raises:
        TransferError: it prints nothing for too long, does not end, or ends with a code other than 0.
    """
    transfer.restart()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            transfer.url.removeprefix(PIPE),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            while block := _read(process.stdout, transfer.timeout_s):
                transfer.write(block)
            code = process.wait(transfer.timeout_s)
        except subprocess.TimeoutExpired:
            raise TransferError("the command does not end") from None
        finally:
            if process.returncode is None:  # not waited for yet: no other process can have its number
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # the shell and all that it started
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]
        if code:
            errors.seek(0)
            last_line = errors.read()[-2000:].decode(errors="replace").strip().rpartition("\n")[2]
            transfer.restart()
            raise TransferError(
                f"the command ended with code {code}{f' ({last_line})' if last_line else ''}", "try it in a shell"
            )


def _read(output: IO[bytes], timeout_s: float) -> bytes:
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        if not selector.select(timeout_s):
            raise TransferError(f"stalled: no byte in {timeout_s:g} s")
    return os.read(output.fileno(), _BLOCK)
