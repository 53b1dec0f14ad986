"""What a plan is made for: GPUs, the links between them, and how many of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One device that a rank runs on; of a CPU, what the cores of one rank reach."""

    name: str
    memory_bytes: int
    """What programs can use of it."""
    fp32_flops: float
    """FLOP/s of products of fp32 matrices, dense; where the card has TF32, in TF32, which runs use."""
    half_flops: float
    """FLOP/s of products of bf16 and fp16 matrices, dense."""
    bandwidth: float
    """Bytes/s of its memory."""
    launch_s: float
    """Seconds of the host for each operation: a step cannot be faster than its operations are launched."""
    source: str
    """Data sheet, or the file of a measurement."""


@dataclass(frozen=True)
class Link:
    """A network, as one rank sees it."""

    name: str
    bandwidth: float
    """Bytes/s that one rank sends while all ranks of its host do."""
    latency_s: float
    """Seconds until a message arrives."""
    source: str


@dataclass(frozen=True)
class Cluster:
    """Where a run would run."""

    ranks: int
    """One for each GPU."""
    ranks_per_host: int
    gpu: Gpu
    within: Link
    """Between the ranks of a host."""
    between: Link
    """Between hosts; not used if there is one."""
    cores_per_host: int
    host_memory_bytes: int
