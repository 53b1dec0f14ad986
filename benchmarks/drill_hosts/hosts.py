"""Hosts on one machine: namespaces with an address, a host name and an ssh server each, joined by a switch.

Nothing of the machine's own settings is changed: `/etc/hosts`, `/etc/ssh`, `/run` and `/dev/shm` are the hosts' own,
in memory; all other files are the machine's, so they serve as a file system that the hosts share. The switch has no
way out: traffic stays between the hosts. All is removed when the hosts are closed, also if this process is killed.

    with Hosts(2) as hosts:
        hosts[0].run(["ssh", "host-2", "hostname"])
        hosts[1].cut()
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from shlex import quote
from typing import Any

from benchmarks.drill_hosts.namespaces import Namespaces, tool, why_no_namespaces

NETWORK = "10.177.0"
"""Private addresses; no packet with them leaves the namespaces."""
_SSH_CONFIG = """\
Host *
    StrictHostKeyChecking yes
    GlobalKnownHostsFile /etc/ssh/ssh_known_hosts
    UserKnownHostsFile /dev/null
    IdentityFile /etc/ssh/user_key
    IdentitiesOnly yes
    BatchMode yes
    ConnectTimeout 10
    LogLevel ERROR
"""
_SSHD_CONFIG = """\
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/user_key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
StrictModes no
PidFile none
MaxStartups 100
"""


def why_no_hosts(*tools: str) -> str | None:
    """Why hosts cannot be made here, in a few words; None: they can.

    Args:
        tools: commands that must be there too, such as `pdsh`, `tc`, `nft`.
    """
    missing = [name for name in ("sshd", "ssh", "ssh-keygen", *tools) if tool(name) is None]
    return why_no_namespaces() or (f"not installed: {', '.join(missing)}" if missing else None)


class Hosts:
    """Some hosts and the switch between them; a context manager and a sequence of :class:`Host`.

    Args:
        number: of hosts; they are called host-1, host-2, …
        own_cores: host i runs on core i alone (modulo the cores there are). Else each may use all.
    """

    def __init__(self, number: int = 2, *, own_cores: bool = False) -> None:
        self._number, self._own_cores = number, own_cores
        self._stack = ExitStack()
        self._hosts: list[Host] = []

    def __enter__(self) -> Hosts:
        with self._stack:
            switch = self._switch = self._stack.enter_context(Namespaces())
            # The keys of ssh, made in memory.
            switch.do(
                "mount -t tmpfs tmpfs /run\n"
                "for name in user_key host_key; do ssh-keygen -q -t ed25519 -N '' -C '' -f /run/$name; done\n"
                "ip link add name bridge type bridge\n"
                "ip link set bridge up"
            )
            keys = {name: switch.do(f"cat /run/{name}") for name in ("user_key", "user_key.pub", "host_key")}
            keys["ssh_known_hosts"] = f"* {switch.do('cat /run/host_key.pub')}"
            cores = sorted(os.sched_getaffinity(0))
            for number in range(1, self._number + 1):
                host = Host(self._stack.enter_context(Namespaces()), switch, number)
                host._core = cores[(number - 1) % len(cores)] if self._own_cores else None
                self._hosts.append(host)
            for host in self._hosts:
                host._set_up(keys, self._hosts)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[Host]:
        return iter(self._hosts)

    def __getitem__(self, place: int) -> Host:
        return self._hosts[place]

    def write_hostfile(self, path: Path, slots: int = 1) -> Path:
        """Write a hostfile as the deepspeed launcher reads it, with all hosts; returns its path."""
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in self))
        return path

    def send_larger_packets(self) -> None:
        """Raise the largest packet of all links from 1,500 bytes to 9,000, as many clusters have it."""
        self._switch.do(
            "for port in bridge $(seq -f port-%g " + str(len(self)) + "); do ip link set $port mtu 9000; done"
        )
        for host in self:
            host.do("ip link set dev eth0 mtu 9000")


class Host:
    """One host. Made by :class:`Hosts`."""

    def __init__(self, namespaces: Namespaces, switch: Namespaces, number: int) -> None:
        self.name, self.address = f"host-{number}", f"{NETWORK}.{number}"
        self._namespaces, self._switch, self._number = namespaces, switch, number
        self._core: int | None = None

    def do(self, script: str) -> str:
        """Run lines of bash on it, wait, and return what they print; an error raises RuntimeError."""
        return self._namespaces.do(script)

    def command(self, *arguments: object) -> list[str]:
        """The command that runs a command on it, in the working directory of who starts it.

        A signal that it gets does not reach the command itself, its only child.
        """
        # The working directory is entered anew, among the mounts of the host.
        inner = ["env", f"--chdir={Path.cwd()}", *map(str, arguments)]
        pinned = [] if self._core is None else ["taskset", "--cpu-list", str(self._core)]
        return [*self._namespaces.enter(), *pinned, *inner]

    def run(self, arguments: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on it, and wait; `options` are those of `subprocess.run`."""
        given = {"capture_output": True, "text": True, "check": False, "stdin": subprocess.DEVNULL} | options
        return subprocess.run(self.command(*arguments), **given)

    def start(self, arguments: Sequence[object], **options: Any) -> subprocess.Popen[bytes]:
        """Start a command on it; `options` are those of `subprocess.Popen`."""
        return subprocess.Popen(self.command(*arguments), stdin=subprocess.DEVNULL, **options)

    def cut(self) -> None:
        """Pull its cable: its link is down, and no packet comes or goes."""
        self._switch.do(f"ip link set port-{self._number} down")

    def join(self) -> None:
        """Plug its cable in again."""
        self._switch.do(f"ip link set port-{self._number} up")

    def limit(self, mbit: float | None, burst_kb: int = 64) -> None:
        """Limit what it sends, by a token bucket.

        Args:
            mbit: 10⁶ bits a second; None: no limit.
            burst_kb: what may leave at once, in 1024 bytes.
        """
        self.do("tc qdisc del dev eth0 root 2>/dev/null || true")
        if mbit is not None:
            self.do(f"tc qdisc add dev eth0 root tbf rate {mbit:g}mbit burst {burst_kb}kb latency 100ms")

    def lose(self, share: float) -> None:
        """Drop packets that come to it, drawn at random.

        Args:
            share: of the packets, 0–1; 0: none.
        """
        self.do("nft flush ruleset")
        if share:
            self.do(
                "nft add table inet lossy\n"
                "nft 'add chain inet lossy in { type filter hook input priority 0; }'\n"
                f"nft 'add rule inet lossy in iifname eth0 numgen random mod 100000 < {round(share * 100000)} drop'"
            )

    def set_link(self, mbit: float | None, loss: float, *, single: bool) -> None:
        """Set what it may send (:meth:`limit`), which packets do not come (:meth:`lose`), and what a packet is.

        Args:
            mbit: 10⁶ bits a second; None: no limit.
            loss: share of the packets, 0–1.
            single: each packet crosses the link by itself. Else up to 64 KiB of a connection cross it as one.
        """
        self.do(f"ip link set dev eth0 gso_max_segs {1 if single else 65535}")
        self.limit(mbit)
        self.lose(loss)

    def sent_bytes(self) -> int:
        """What it has sent so far, headers included."""
        (link,) = json.loads(self.do("ip -json -statistics link show eth0"))
        return int(link["stats64"]["tx"]["bytes"])

    def _set_up(self, files: Mapping[str, str], hosts: Sequence[Host]) -> None:
        """Give it its link, its name, its own files, and start its ssh server."""
        names = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts)
        contents = {**files, "ssh_config": _SSH_CONFIG, "sshd_config": _SSHD_CONFIG, "hosts": names}
        port = f"port-{self._number}"
        # Both ends are made from outside: neither shell sees the number of the other.
        link = f"{tool('ip')} link add {port} type veth peer name eth0 netns {self._namespaces.number}"
        subprocess.run([*self._switch.enter("--net"), *link.split()], check=True)
        self._switch.do(f"ip link set {port} master bridge up")
        written = "".join(f"printf %s {quote(text)} >/etc/ssh/{name}\n" for name, text in contents.items())
        pinned = "" if self._core is None else f"taskset --cpu-list {self._core} "
        self.do(
            f"hostname {self.name}\n"
            "ip link set lo up\n"
            f"ip addr add {self.address}/24 dev eth0\n"
            "ip link set eth0 up\n"
            "umask 077\n"
            "for place in /etc/ssh /run /dev/shm; do mount -t tmpfs tmpfs $place; done\n"
            "chmod 1777 /dev/shm\n"
            "chmod 755 /etc/ssh /run\n"
            "mkdir -m 755 /run/sshd\n"
            f"{written}"
            "chmod 644 /etc/ssh/hosts /etc/ssh/ssh_config /etc/ssh/ssh_known_hosts\n"
            "mount --bind /etc/ssh/hosts /etc/hosts\n"
            # A configuration of the user's own would come before the host's.
            "[[ ! -d ~/.ssh ]] || mount -t tmpfs tmpfs ~/.ssh\n"
            # bash reads it at each command over ssh. What it starts may take locks that all hosts share.
            "[[ ! -f ~/.bashrc ]] || mount --bind /dev/null ~/.bashrc\n"
            f"{pinned}{tool('sshd')} -f /etc/ssh/sshd_config </dev/null >/dev/null 2>&1"
        )
