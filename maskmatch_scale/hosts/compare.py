"""In what hosts differ, whether a run would be wrong for it, and what to do: one line for each difference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_high, median_low
from typing import Any

from maskmatch_scale.hosts.facts import Facts
from maskmatch_scale.hosts.job import JobFacts

_NAMED = 4
"""Hosts that a line names one by one."""
_DECIDING = (
    "torch", "CUDA of torch", "deepspeed", "accelerate", "timm", "transformers", "numpy", "torchvision",
)  # fmt: skip
"""Packages that compute, draw or communicate: in two versions ranks may train different models, or hang."""
_OTHERS = ("python", "driver", "webdataset", "simplejpeg", "pillow")
_CLOCKS_S = 2.0
"""Seconds between clocks of hosts that are worth a warning: times in logs of different hosts are compared."""
_SLOWER = 0.9
"""A GPU whose highest clock or power is below this share of the others' is worth a warning."""
_SHARED_MEMORY_GIB = 0.25
_RUN_GIB, _CACHE_GIB = 5.0, 5.0


@dataclass(frozen=True)
class Report:
    """What one host says of itself."""

    label: str
    """How messages name it."""
    facts: Facts
    job: JobFacts | None = None
    """Of a recipe; None: none was given."""


@dataclass(frozen=True)
class Finding:
    """A line on hosts that differ, or on one that lacks something."""

    line: str
    """Names the hosts, what is there, and what to do."""
    stops: bool
    """Whether a run would be wrong, or not start; else it is only odd."""


def compare(reports: Sequence[Report], writer: str) -> list[Finding]:
    """Compare hosts; what stops a run comes first.

    Args:
        reports: of all hosts, in the order of their ranks.
        writer: who has written into the place of `run.dir` what the hosts look for there.
    """
    found = [*_of_software(reports), *_of_hardware(reports), *_of_job(reports, writer), *_of_room(reports)]
    found += _of_addresses(reports)
    return sorted(found, key=lambda finding: not finding.stops)


def _of_software(reports: Sequence[Report]) -> list[Finding]:
    found = []
    for names, stops in ((("maskmatch_scale", *_DECIDING), True), (_OTHERS, False)):
        versions = {report.label: [report.facts.versions.get(name, "unknown") for name in names] for report in reports}
        differ = [number for number in range(len(names)) if len({known[number] for known in versions.values()}) > 1]
        values = {
            label: ", ".join(f"{names[number]} {known[number]}" for number in differ)
            for label, known in versions.items()
        }
        if odd := differing(values):
            found.append(Finding(f"versions: {odd}; give all hosts one environment", stops))
    if len({report.facts.versions.get("maskmatch_scale") for report in reports}) == 1:
        sources = {report.label: f"{report.facts.source} in {report.facts.folder}" for report in reports}
        if odd := differing(sources, _digest):
            found.append(Finding(f"the code of maskmatch_scale: {odd}; install the same commit on all hosts", True))
    return found


def _digest(value: str) -> str:
    return value.partition(" ")[0]


def _of_hardware(reports: Sequence[Report]) -> list[Finding]:
    found = []
    kinds = {report.label: gpus_of(report.facts) for report in reports}
    if odd := differing(kinds):
        has = {bool(report.facts.gpus) for report in reports}
        if len(has) > 1:
            line = f"GPUs: {odd}; ranks on GPUs and on CPUs cannot train together: look at the driver (nvidia-smi)"
            return [Finding(line, True)]
        found.append(Finding(f"GPUs: {odd}; every step takes as long as on the slowest", False))
    else:
        for name, unit in (("clock_mhz", "MHz at most"), ("power_w", "W at most")):
            found += _slow_gpus(reports, name, unit)
    threads = {report.label: report.facts.omp_threads or "not set" for report in reports}
    if odd := differing(threads):
        found.append(Finding(f"OMP_NUM_THREADS is {odd}; set the same on every host", False))
    return found


def gpus_of(facts: Facts) -> str:
    """The GPUs of a host in words: `8 × NVIDIA H100 80GB HBM3, 79 GiB`, or `none`."""
    kinds = [f"{gpu.name}, {gpu.memory_gib} GiB" for gpu in facts.gpus]
    return " + ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds)) or "none"


def _slow_gpus(reports: Sequence[Report], name: str, unit: str) -> list[Finding]:
    lowest = {}
    for report in reports:
        known = [value for gpu in report.facts.gpus if (value := getattr(gpu, name)) is not None]
        if known:
            lowest[report.label] = min(known)
    if not lowest:
        return []
    usual = median_high(lowest.values())
    slow = {label: value for label, value in lowest.items() if value < _SLOWER * usual}
    return [
        Finding(f"a GPU of {label} has {value} {unit}, elsewhere {usual:g}; look at nvidia-smi -q there", False)
        for label, value in list(slow.items())[:_NAMED]
    ]


def _of_addresses(reports: Sequence[Report]) -> list[Finding]:
    """Hosts whose own name stands for an address that only they reach, while they reach rank 0 by another."""
    found = []
    for report in reports:
        known = {"own": "", "towards": "", "interface": "ITS_INTERFACE"} | report.facts.addresses
        if _is_loopback(known["own"]) and known["towards"] and not _is_loopback(known["towards"]):
            line = (
                f"{report.label}: its name {report.facts.host} stands for {known['own']} there, on which gloo listens "
                f"and no other host reaches it; correct /etc/hosts, or set GLOO_SOCKET_IFNAME={known['interface']}"
            )
            found.append(Finding(line, False))
    return found[:_NAMED]


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def compare_slots(reports: Sequence[Report], slots: Mapping[str, int]) -> list[Finding]:
    """Compare the GPUs of hosts with the ranks that a hostfile gives them. Without any GPU ranks are on CPUs.

    Args:
        reports: of the hosts.
        slots: of each host by its label.
    """
    if not any(report.facts.gpus for report in reports):
        return []
    found = []
    for report in reports:
        wanted, gpus = slots[report.label], len(report.facts.gpus)
        if wanted > gpus:
            line = f"{report.label}: slots={wanted}, but {gpus} GPUs are found there; write slots={gpus}, or look at "
            found.append(Finding(f"{line}nvidia-smi there", True))
        elif wanted < gpus:
            found.append(Finding(f"{report.label}: slots={wanted} leaves {gpus - wanted} of {gpus} GPUs unused", False))
    return found


def _of_job(reports: Sequence[Report], writer: str) -> list[Finding]:
    jobs = {report.label: report.job for report in reports if report.job is not None}
    found = []
    for fault, labels in _by_line({label: job.faults for label, job in jobs.items()}).items():
        found.append(Finding(f"{_some(labels)}: {fault}", True))
    for fault, labels in _by_line({label: job.unreached for label, job in jobs.items()}).items():
        # What no host can read may be meant to be skipped.
        found.append(Finding(f"{_some(labels)}: {fault}", len(labels) < len(jobs)))
    for root in dict.fromkeys(root for job in jobs.values() for root in job.data):
        values = {label: job.data[root] for label, job in jobs.items() if root in job.data}
        if odd := differing(values):
            line = f"the index of {root} is {odd}; every host needs the same shards under the same path"
            found.append(Finding(line, True))
    if odd := differing({label: job.precision for label, job in jobs.items()}):
        found.append(Finding(f"engine.precision is {odd}, by their GPUs; set one that all of them have", True))
    blind = [label for label, job in jobs.items() if job.sees_run_dir is False]
    if blind:
        line = (
            f"run.dir is not shared: {_some(blind)} cannot see what {writer} writes there; put it on a disk that all "
            "hosts mount under the same path"
        )
        found.append(Finding(line, True))
    return found


def _by_line(lines: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The hosts that each line is of, by the line."""
    labels: dict[str, list[str]] = {}
    for label, own in lines.items():
        for line in own:
            labels.setdefault(line, []).append(label)
    return labels


def _of_room(reports: Sequence[Report]) -> list[Finding]:
    shared = {report.label: report.facts.shared_memory_gib for report in reports}
    jobs = {report.label: report.job for report in reports if report.job is not None}
    runs = {label: job.run_free_gib for label, job in jobs.items()}
    caches = {label: job.cache_free_gib for label, job in jobs.items()}
    return [
        *_little("/dev/shm", shared, _SHARED_MEMORY_GIB, "give the container more"),
        *_little("run.dir", runs, _RUN_GIB, "free some, or name another disk"),
        *_little("the cache of shards", caches, _CACHE_GIB, "free some, or set data.cache_dir to another disk"),
    ]


def _little(what: str, free: Mapping[str, float | None], least: float, remedy: str) -> list[Finding]:
    """A line on hosts with less than ``least`` GiB free; None: not known."""
    little = {label: value for label, value in free.items() if value is not None and value < least}
    if not little:
        return []
    return [Finding(f"{_some(list(little))}: {min(little.values()):.2g} GiB are free for {what}; {remedy}", False)]


def compare_clocks(offsets: Mapping[str, float]) -> list[Finding]:
    """Name hosts whose clocks differ from the others'.

    Args:
        offsets: seconds by the clock of each host at about the same moment.
    """
    usual = median_low(offsets.values())  # of two hosts, one of them
    off = {label: value - usual for label, value in offsets.items() if abs(value - usual) > _CLOCKS_S}
    return [
        Finding(f"the clock of {label} is {value:+.1f} s off; set it by NTP, so that times in logs agree", False)
        for label, value in list(off.items())[:_NAMED]
    ]


def differing(values: Mapping[str, str], key: Callable[[str], Any] = str) -> str | None:
    """Who has another value than most: `B on gpu-b, and A on gpu-a, gpu-c`; None if all have the same.

    Args:
        values: by the labels of hosts, the first host first: where as many have one value as the other, its counts.
        key: what of a value is compared.
    """
    having: dict[Any, list[str]] = {}
    for label, value in values.items():
        having.setdefault(key(value), []).append(label)
    if len(having) < 2:
        return None
    usual = max(having, key=lambda value: len(having[value]))  # the first of several
    ordered = [*(group for value, group in having.items() if value != usual), having[usual]]
    parts = [f"{values[group[0]]} on {_some(group)}" for group in ordered]
    return f"{', '.join(parts[:-1])}, and {parts[-1]}"


def _some(labels: Sequence[str]) -> str:
    """The first of some labels, and how many more there are."""
    more = len(labels) - _NAMED
    return ", ".join(labels[:_NAMED]) + (f" and {more} more" if more > 0 else "")
