"""Asks the hosts of a hostfile what they are, over ssh, as the deepspeed launcher would start ranks there.

Like that launcher it takes this Python by its path, enters this working directory, and passes on the variables that it
does (DeepSpeed's `launcher/runner.py`: `EXPORT_ENVS`, and files `.deepspeed_env`). They may hold secrets, and every
user of a host can read command lines (`ps`): so variables are sent through stdin.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskmatch_scale.hosts.compare import Finding, Report, compare, compare_clocks, compare_slots
from maskmatch_scale.hosts.facts import Facts
from maskmatch_scale.hosts.job import JobFacts
from maskmatch_scale.progress import progress_of
from maskmatch_scale.redact import redacted

_AT_ONCE = 64
"""Connections at a time. Each is a process here."""
_CONNECT_S, _ANSWER_S = 10, 120.0
"""Seconds for a connection, and for an answer: over a network disk that was not read yet, Python imports slowly."""
_EXPORTED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""How the names of variables begin that deepspeed passes on."""
_NO_FOLDER, _NO_PYTHON, _SSH_FAILED = 90, 91, 255
_FIRST_PORT, _PORTS = 20_000, 20_000


@dataclass(frozen=True)
class Answer:
    """What one host has answered."""

    host: str
    values: dict[str, Any] | None
    """What it says of itself, and `clock`: how many seconds its clock is ahead of this machine's."""
    fault: str = ""
    """Why there are none, and what to do."""


@dataclass(frozen=True)
class Survey:
    """What all hosts have answered, in the order of the hostfile, and what follows."""

    slots: Mapping[str, int]
    answers: Sequence[Answer]
    findings: Sequence[Finding]
    links: str = ""
    """How fast they reach each other, in one line; empty: not measured."""

    def values(self) -> dict[str, Any]:
        """As values of JSON."""
        hosts = {
            answer.host: {"slots": self.slots[answer.host], "error": answer.fault or None} | (answer.values or {})
            for answer in self.answers
        }
        findings = [{"line": one.line, "stops": one.stops} for one in self.findings]
        return {"hosts": hosts, "findings": findings, "links": self.links or None}


def survey(slots: Mapping[str, int], arguments: Sequence[str], token: str, *, with_links: bool = False) -> Survey:
    """Ask all hosts at the same time, and compare what they answer.

    Args:
        slots: of each host (:func:`maskmatch_scale.hosts.hostfile.read_hostfile`).
        arguments: recipe and overrides, as words of a command; empty: hosts are compared without one.
        token: path of a file that was just written in the place of `run.dir`; empty: there is none.
        with_links: whether the links between hosts are measured too, by a job of one rank on each.
    """
    first = next(iter(slots)).rpartition("@")[2]
    asked = json.dumps({"token": token, "towards": first})
    words = ["doctor", "--as-host", asked, *arguments]
    answers = _ask(list(slots), lambda host: remote_script(words), "asking")
    reports = [
        Report(
            answer.host,
            Facts.from_values(answer.values["facts"]),
            JobFacts.from_values(answer.values["job"]) if answer.values["job"] is not None else None,
        )
        for answer in answers
        if answer.values is not None
    ]
    found = [Finding(f"{answer.host}: {answer.fault}", True) for answer in answers if answer.fault]
    if reports:
        found += [*compare_slots(reports, slots), *compare(reports, "this machine")]
        found += compare_clocks({answer.host: answer.values["clock"] for answer in answers if answer.values})
    links = ""
    if with_links and len(slots) > 1 and not any(finding.stops for finding in found):
        links, more = _measure_links(list(slots))
        found += more
    return Survey(slots, answers, sorted(found, key=lambda finding: not finding.stops), links)


def _measure_links(hosts: Sequence[str]) -> tuple[str, list[Finding]]:
    """Start a rank on each host to measure the links between them: a line on them, and those on slow ones."""
    port = str(_FIRST_PORT + secrets.randbelow(_PORTS))
    job = {"WORLD_SIZE": str(len(hosts)), "MASTER_ADDR": hosts[0].rpartition("@")[2], "MASTER_PORT": port}
    ranks = {host: {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_SIZE": "1"} for rank, host in enumerate(hosts)}

    def script(host: str) -> str:
        return remote_script(["doctor", "--as-rank"], job | ranks[host])

    answers = _ask(hosts, script, "measuring", at_once=len(hosts))
    faults = [answer for answer in answers if answer.fault]
    if faults or answers[0].values is None:
        return "", [Finding(f"{one.host}: its links could not be measured: {one.fault}", True) for one in faults]
    return answers[0].values["links"], [Finding(line, False) for line in answers[0].values["slow"]]


def _ask(hosts: Sequence[str], script: Callable[[str], str], task: str, *, at_once: int = _AT_ONCE) -> list[Answer]:
    answers: dict[str, Answer] = {}
    with (
        ThreadPoolExecutor(min(at_once, len(hosts))) as pool,
        progress_of(task, len(hosts), unit="hosts", elsewhere="lines if slow") as advance,
    ):
        for done in as_completed([pool.submit(_answer, host, script(host)) for host in hosts]):
            answers[done.result().host] = done.result()
            advance()
    return [answers[host] for host in hosts]


def remote_script(words: Sequence[str], more: Mapping[str, str] = {}) -> str:
    """Lines for `sh` on another host, which run `maskmatch` there.

    Args:
        words: after `maskmatch`.
        more: variables beside those that are passed on.
    """
    here = Path.cwd()
    exports = [f"export {name}={shlex.quote(value)}" for name, value in (exported(here) | dict(more)).items()]
    lines = [
        *exports,
        f"cd {shlex.quote(str(here))} || exit {_NO_FOLDER}",
        f"command -v {shlex.quote(sys.executable)} >/dev/null || exit {_NO_PYTHON}",
        f"exec {shlex.join([sys.executable, '-m', 'maskmatch_scale', *words])} </dev/null",
    ]
    return "".join(f"{line}\n" for line in lines)


def exported(here: Path) -> dict[str, str]:
    """The variables that deepspeed passes on to other hosts, from this process and files `.deepspeed_env`."""
    found = {name: value for name, value in os.environ.items() if name.startswith(_EXPORTED)}
    path = found.get("PYTHONPATH")
    found["PYTHONPATH"] = f"{here}:{path}" if path else str(here)
    for folder in (Path.home(), here):
        file = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        if file.is_file():
            pairs = (line.partition("=") for line in file.read_text().splitlines())
            found |= {name.strip(): value for name, sign, value in pairs if sign}
    return found


def _answer(host: str, script: str) -> Answer:
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT_S}", "-o", "LogLevel=ERROR"]
    try:
        done = subprocess.run(
            ["ssh", *options, "--", host, "exec sh -s"],
            input=script, capture_output=True, text=True, timeout=_ANSWER_S, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return Answer(host, None, "there is no `ssh` on this machine; install an ssh client (openssh-client)")
    except subprocess.TimeoutExpired:
        return Answer(host, None, f"no answer within {_ANSWER_S:g} s; log in and look at its disks and load")
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        try:
            values = json.loads(lines[-1])
        except ValueError:
            return Answer(host, None, f"its answer cannot be read: {lines[-1][:200]!r}")
        return Answer(host, values | {"clock": round(values["time"] - time.time(), 3)})
    return Answer(host, None, explained(done.returncode, done.stderr))


def explained(code: int, errors: str) -> str:
    """Why a host gave no answer, and what to do, in one line.

    Args:
        code: with which ssh has ended.
        errors: what it, or the command on the host, has written to stderr.
    """
    said = [redacted(line.strip()) for line in errors.splitlines() if line.strip()]
    last = said[-1] if said else f"exit code {code}"
    if code == _NO_FOLDER:
        return f"it has no folder {Path.cwd()}; start from a folder that all hosts share, as deepspeed enters it there"
    if code == _NO_PYTHON:
        return f"it has no {sys.executable}; put the Python environment on a disk that all hosts mount alike"
    if code == _SSH_FAILED:
        return f"ssh: {last.removeprefix('ssh: ')}; {_advice(errors)}"
    if own := [line for line in said if line.startswith("maskmatch: error: ")]:
        return own[-1].removeprefix("maskmatch: error: ")
    if "No such option" in errors or "no such option" in errors.lower():
        return "its maskmatch_scale is another version, which does not answer; give all hosts one environment"
    if missing := re.search(r"No module named '?([\w.]+)", errors):
        return f"Python finds no module {missing[1]} there ({sys.executable}); give all hosts one environment"
    return f"{last}; run {sys.executable} -m maskmatch_scale doctor there"


def _advice(errors: str) -> str:
    for sign, advice in (
        ("Could not resolve", "correct its name in the hostfile, or in /etc/hosts or DNS"),
        ("Connection refused", "start sshd there, or name its port in ~/.ssh/config"),
        ("Permission denied", "let a key without passphrase in (ssh-copy-id), or load it into ssh-agent"),
        ("Host key verification", "log in once by hand, or add its key to known_hosts (ssh-keyscan)"),
    ):
        if sign in errors:
            return advice
    return "look whether it is up and its network reaches this machine"
