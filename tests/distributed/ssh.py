"""An ssh server of one's own on this machine, under names that its own client alone knows.

pdsh and deepspeed call `ssh`, found by PATH: a script of this name there takes a configuration in which all the names
stand for the server. Nothing in a home folder or in /etc is read or changed.
"""

import os
import shlex
import shutil
import subprocess
import time
from contextlib import suppress

from maskmatch_scale.engine.setup import _free_port

_PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"


def why_no_ssh(*tools):
    """Why there can be no such server here, in a few words; None: there can be one."""
    missing = [name for name in ("sshd", "ssh", "ssh-keygen", *tools) if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return "sshd needs root" if os.geteuid() != 0 else None


class Ssh:
    """The server, a context manager.

    Args:
        folder: an empty one, for its files.
        names: host names that all stand for this machine.
    """

    def __init__(self, folder, names):
        self._folder, self._port = folder, _free_port()
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        (folder / "sshd.conf").write_text(
            f"Port {self._port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nPasswordAuthentication no\nMaxStartups 100\n"
            f"PermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\n"
        )
        (folder / "ssh.conf").write_text(
            f"Host {' '.join(names)}\n  HostName 127.0.0.1\n  Port {self._port}\n  IdentityFile {folder}/user\n"
            "  IdentitiesOnly yes\n  BatchMode yes\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
            "  LogLevel ERROR\n"
        )
        (folder / "bin").mkdir()
        client = folder / "bin" / "ssh"
        client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {shlex.quote(str(folder / "ssh.conf"))} "$@"\n')
        client.chmod(0o755)

    def path(self, rest=_PATH):
        """A PATH on which `ssh` is the client that knows the names."""
        return f"{self._folder / 'bin'}{os.pathsep}{rest}"

    def __enter__(self):
        # sshd wants this folder; the package's service makes it.
        with suppress(FileExistsError):
            os.mkdir("/run/sshd", 0o755)  # noqa: PTH102
        command = [shutil.which("sshd", path=_PATH), "-D", "-e", "-f", self._folder / "sshd.conf"]
        with (self._folder / "sshd.log").open("w") as log:
            self._server = subprocess.Popen(command, stderr=log)
        name = (self._folder / "ssh.conf").read_text().split()[1]
        tried = [self._folder / "bin" / "ssh", name, "true"]
        until = time.monotonic() + 20
        while subprocess.run(tried, capture_output=True, check=False).returncode:
            if self._server.poll() is not None or time.monotonic() > until:
                self.__exit__()
                raise RuntimeError((self._folder / "sshd.log").read_text())
            time.sleep(0.1)
        return self

    def __exit__(self, *_):
        self._server.terminate()
        self._server.wait()
