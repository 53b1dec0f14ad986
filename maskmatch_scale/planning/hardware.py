"""GPUs and networks by the names of `maskmatch plan`, with the figures of their data sheets.

Nothing here is what a program reaches: that is in `planning/efficiency.py`, or measured (`planning/measure.py`).
FLOP/s are those of `device_peaks.PEAKS`.
"""

from __future__ import annotations

import difflib
from typing import NamedTuple

from maskmatch_scale.device_peaks import PEAKS
from maskmatch_scale.errors import UserError
from maskmatch_scale.planning.efficiency import LAUNCH_S
from maskmatch_scale.planning.setting import Cluster, Gpu, Link


class Card(NamedTuple):
    """A GPU by its data sheet, beside its peaks."""

    peaks: str
    """Its line in `PEAKS`."""
    memory_gb: float
    """10⁹ bytes."""
    bandwidth_gb_s: float
    """Of its memory, 10⁹ bytes/s."""
    link_gb_s: float
    """What it sends to the other GPUs of its host, 10⁹ bytes/s in one direction; data sheets print both together."""
    link: str
    has_bf16: bool = True


CARDS: dict[str, Card] = {
    "b200": Card("B200", 180, 7700, 900, "NVLink 5"),
    "gb200": Card("GB200", 186, 8000, 900, "NVLink 5"),
    "h200": Card("H200", 141, 4800, 450, "NVLink 4"),
    "h100": Card("H100", 80, 3350, 450, "NVLink 4"),
    "h100-nvl": Card("H100 NVL", 94, 3900, 64, "PCIe 5"),
    "h100-pcie": Card("H100 PCIe", 80, 2000, 64, "PCIe 5"),
    "a100-80": Card("A100", 80, 2039, 300, "NVLink 3"),
    "a100-40": Card("A100", 40, 1555, 300, "NVLink 3"),
    "a40": Card("A40", 48, 696, 32, "PCIe 4"),
    "a30": Card("A30", 24, 933, 32, "PCIe 4"),
    "a10": Card("A10", 24, 600, 32, "PCIe 4"),
    "l40s": Card("L40S", 48, 864, 32, "PCIe 4"),
    "l40": Card("L40", 48, 864, 32, "PCIe 4"),
    "l4": Card("L4", 24, 300, 32, "PCIe 4"),
    "v100": Card("V100 SXM2", 32, 900, 150, "NVLink 2", has_bf16=False),
    "v100-16": Card("V100 SXM2", 16, 900, 150, "NVLink 2", has_bf16=False),
    "t4": Card("T4", 16, 320, 16, "PCIe 3", has_bf16=False),
}
"""By the names of `--gpu`. Of cards on PCIe the figure is that of its 16 lanes, which all GPUs of a host share with the
network: less may be there. A bridge between two such cards (H100 NVL, A40, A30) does not count: a ring over more than
two of them crosses PCIe all the same."""


class Network(NamedTuple):
    """A network between hosts."""

    gbit_s: float
    """Of one adapter, 10⁹ bit/s."""
    per_gpu: bool
    """Whether there is one adapter for each GPU, as in the makers' hosts with 8 of them; else one for the host."""
    latency_s: float
    """Of a small message, as makers and operators of such networks name it."""


NETWORKS: dict[str, Network] = {
    "ib-xdr-800": Network(800, True, 5e-6),
    "ib-ndr-400": Network(400, True, 5e-6),
    "ib-hdr-200": Network(200, True, 5e-6),
    "efa-400": Network(400, False, 2e-5),
    "roce-100": Network(100, True, 1e-5),
    "ethernet-100": Network(100, False, 3e-5),
    "ethernet-25": Network(25, False, 3e-5),
    "ethernet-10": Network(10, False, 5e-5),
    "ethernet-1": Network(1, False, 1e-4),
}
"""By the names of `--link`."""

WITHIN_LATENCY_S = 3e-6
"""Until a message of NCCL has gone from one GPU of a host to the next."""
LOOPBACK, LOOPBACK_LATENCY_S = 1e9, 2e-4
"""Bytes/s and seconds of gloo between two processes of a host."""
CORES_PER_GPU = 16
HOST_MEMORY_PER_GPU = 128_000_000_000
"""Assumed of a host, unless it is said."""


def gpu_named(name: str, memory_gb: float | None = None) -> Gpu:
    """A GPU of :data:`CARDS`.

    Args:
        name: as there; case does not matter.
        memory_gb: 10⁹ bytes, in place of the table's.

    Raises:
        UserError: there is no such name, or no memory.
    """
    key = name.lower().replace("_", "-")
    if key not in CARDS:
        near = difflib.get_close_matches(key, CARDS, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else ";"
        own = " This machine's CPU, or a GPU that is not in the table: --measure FILE, run on it"
        raise UserError(f"--gpu {name}: not in the table{hint} there are {', '.join(CARDS)}.{own}")
    card = CARDS[key]
    peaks = PEAKS[card.peaks]
    return Gpu(
        key,
        memory_bytes(card.memory_gb if memory_gb is None else memory_gb),
        (peaks.tf32 or peaks.fp32) * 1e12,
        peaks.half * 1e12,
        card.bandwidth_gb_s * 1e9,
        LAUNCH_S,
        peaks.source,
    )


def memory_bytes(memory_gb: float, option: str = "--gpu-memory") -> int:
    """Bytes of a memory.

    Args:
        memory_gb: 10⁹ bytes.
        option: that said it.

    Raises:
        UserError: it is not above 0.
    """
    if not 0 < memory_gb < float("inf"):
        raise UserError(f"{option} {memory_gb:g}: it must be above 0 GB")
    return int(memory_gb * 1e9)


def has_bf16(gpu: Gpu) -> bool:
    """Whether it computes in bf16; what is not in the table does."""
    card = _card_of(gpu)
    return card is None or card.has_bf16


def _card_of(gpu: Gpu) -> Card | None:
    """Of a GPU by its name in the table, or by torch's name of a measured one, such as `NVIDIA H100 80GB HBM3`."""
    if gpu.name in CARDS:
        return CARDS[gpu.name]
    words = f" {gpu.name.replace('-', ' ')} "
    found = [card for card in CARDS.values() if f" {card.peaks} " in words]
    return max(found, key=lambda card: len(card.peaks), default=None)


def is_cpu(gpu: Gpu) -> bool:
    """Whether ranks run on cores: the table has GPUs alone, and a measured GPU has its name from torch."""
    return gpu.name == "cpu"


def within_host(gpu: Gpu) -> Link:
    """The link between the GPUs of a host."""
    if is_cpu(gpu):
        return Link("memory of the host", LOOPBACK, LOOPBACK_LATENCY_S, "an assumption: gloo over loopback")
    card = _card_of(gpu)
    if card is None or ("PCIE" in gpu.name.upper() and "PCIe" not in card.link):
        return Link("PCIe 4", 32e9, WITHIN_LATENCY_S, "an assumption: 16 lanes of PCIe 4")
    return Link(card.link, card.link_gb_s * 1e9, WITHIN_LATENCY_S, f"data sheet of {card.peaks}")


def link_named(name: str, ranks_per_host: int) -> Link:
    """A network between hosts, as one rank sees it while the others of its host send too.

    Args:
        name: of :data:`NETWORKS`; or a number, 10⁹ bit/s of a host.
        ranks_per_host: which share it.

    Raises:
        UserError: neither.
    """
    network = NETWORKS.get(name.lower())
    if network is None:
        try:
            network = Network(float(name), False, 3e-5)
        except ValueError:
            raise UserError(f"--link {name}: neither a number of Gbit/s nor one of {', '.join(NETWORKS)}") from None
        if not 0 < network.gbit_s < float("inf"):
            raise UserError(f"--link {name}: it must be above 0 Gbit/s")
    share = 1 if network.per_gpu else ranks_per_host
    per = "for each GPU" if network.per_gpu else "for each host"
    return Link(name, network.gbit_s * 1e9 / 8 / share, network.latency_s, f"{network.gbit_s:g} Gbit/s {per}")


def cluster_of(
    gpus: int,
    gpu: Gpu,
    *,
    gpus_per_host: int = 8,
    link: str = "ib-ndr-400",
    within: Link | None = None,
    cores_per_host: int | None = None,
    host_memory_gb: float | None = None,
) -> Cluster:
    """A cluster of equal hosts.

    Args:
        gpus: ranks, one for each.
        gpu: of every rank.
        gpus_per_host: fewer if there are fewer.
        link: between hosts, see :func:`link_named`.
        within: between the ranks of a host; None: that of the table.
        cores_per_host: None: :data:`CORES_PER_GPU` for each GPU.
        host_memory_gb: 10⁹ bytes of a host; None: :data:`HOST_MEMORY_PER_GPU` for each GPU.

    Raises:
        UserError: no GPUs, or numbers that do not divide.
    """
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: it must be at least 1")
    if gpus_per_host < 1:
        raise UserError(f"--gpus-per-host {gpus_per_host}: it must be at least 1")
    a_host = min(gpus, gpus_per_host)
    if gpus % a_host:
        raise UserError(
            f"--gpus {gpus} with --gpus-per-host {gpus_per_host}: hosts must be alike; take a multiple of "
            f"{gpus_per_host}, such as {gpus - gpus % a_host}, or say how many GPUs a host has"
        )
    return Cluster(
        gpus,
        a_host,
        gpu,
        within or within_host(gpu),
        link_named(link, a_host),
        cores_per_host or CORES_PER_GPU * a_host,
        HOST_MEMORY_PER_GPU * a_host if host_memory_gb is None else memory_bytes(host_memory_gb, "--host-memory"),
    )
