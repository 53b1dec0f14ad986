"""A shell in Linux namespaces of its own: network, host name, mounts, processes, shared memory.

The shell is process 1 of its process namespace and reads commands from a pipe. When the pipe is closed, also because
the process that started it was killed, the shell ends; the kernel then kills what runs in the namespaces and removes
their interfaces and mounts. So nothing is left behind, and nothing has a name on the machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from functools import cache

import psutil

_TOOLS_PATH = f"{os.environ.get('PATH', '')}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
_NAMESPACES = ("--net", "--mount", "--uts", "--pid", "--ipc")


def tool(name: str) -> str | None:
    """Path of a command, also where only the administrator's PATH has it; None: it is not installed."""
    return shutil.which(name, path=_TOOLS_PATH)


@cache
def why_no_namespaces() -> str | None:
    """Why namespaces cannot be made here, in a few words; None: they can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "namespaces of the network need root"
    missing = [name for name in ("unshare", "nsenter", "bash", "ip", "mount") if tool(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    bridge = "ip link add name tried type bridge"
    tried = subprocess.run(
        [tool("unshare") or "", *_NAMESPACES, "--fork", "--mount-proc", *bridge.split()],
        env=os.environ | {"PATH": _TOOLS_PATH}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return f"namespaces are not allowed: {tried.stderr.strip()}" if tried.returncode else None


class Namespaces:
    """Namespaces of one host, or of what stands between hosts; a context manager."""

    def __init__(self) -> None:
        self._shell = subprocess.Popen(
            [tool("unshare") or "unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash"],
            env=os.environ | {"PATH": _TOOLS_PATH},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C is for who made it
        )
        try:
            self.do("true")  # then the namespaces are there
            (shell,) = psutil.Process(self._shell.pid).children()
        except BaseException:
            self.__exit__()
            raise
        self.number: int = shell.pid
        """Process number of the shell, as the machine sees it."""

    def __enter__(self) -> Namespaces:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        self._shell.stdin.close()
        self._shell.wait(timeout=30)
        self._shell.stdout.close()

    def do(self, script: str) -> str:
        """Run lines of bash in it, and wait; what they print.

        Raises:
            RuntimeError: a line ended with an error; what it printed.
        """
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        mark = uuid.uuid4().hex
        end = f"end-{mark}"
        # In a shell of its own, so that the first error ends the script and not the host. It has no input, or its
        # commands would read what is written here next.
        self._shell.stdin.write(f"bash -e -c \"$(cat <<'{mark}'\n{script}\n{mark}\n)\" </dev/null\necho {end} $?\n")
        self._shell.stdin.flush()
        printed: list[str] = []
        for line in self._shell.stdout:
            if line.startswith(end):
                if line.split()[1] != "0":
                    raise RuntimeError(f"{script}\nended with an error: {''.join(printed)}")
                return "".join(printed)
            printed.append(line)
        raise RuntimeError(f"the shell has ended: {''.join(printed)}")

    def enter(self, *kinds: str) -> list[str]:
        """The beginning of a command that runs what follows in them.

        Args:
            kinds: options of `nsenter`; none: all namespaces. Among its processes `nsenter` starts it as its child, and
                does not pass signals on.
        """
        return [tool("nsenter") or "nsenter", f"--target={self.number}", *(kinds or _NAMESPACES)]
