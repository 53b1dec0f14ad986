"""What a host is: its software, GPUs, memory and addresses, found out in a second and without using a GPU."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import socket
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from maskmatch_scale import __version__

PACKAGES = (
    "deepspeed", "accelerate", "timm", "transformers", "numpy", "torchvision", "webdataset", "simplejpeg", "pillow",
)  # fmt: skip
"""Distributions whose versions are compared, beside torch and this package."""
SHARED_MEMORY = Path("/dev/shm")
_QUERY = ("uuid", "clocks.max.sm", "power.limit", "driver_version")
_ANSWER_S = 5.0
"""How long nvidia-smi may take."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process sees."""

    name: str
    memory_gib: int
    clock_mhz: int | None = None
    """The highest clock that its multiprocessors may have; None: nvidia-smi does not say."""
    power_w: int | None = None
    """The power that it may draw; None: nvidia-smi does not say."""


@dataclass(frozen=True)
class Facts:
    """What one host is. All values are of JSON."""

    host: str
    """Its own name."""
    versions: dict[str, str]
    """By name of the package, also `python`, `CUDA of torch` and `driver`; `not installed` where there is none."""
    source: str
    """Digest of this package's files of code."""
    folder: str
    """Where they are."""
    gpus: tuple[Gpu, ...]
    cores: int
    """That this process may use."""
    memory_gib: float
    shared_memory_gib: float
    """Free in /dev/shm."""
    omp_threads: str
    """`OMP_NUM_THREADS`; empty: not set."""
    addresses: dict[str, str] = field(default_factory=dict)
    """`own`: what its name stands for; `towards`: from which it reaches rank 0, with `interface`; what is known."""

    @classmethod
    def here(cls, towards: tuple[str, int] | None = None) -> Facts:
        """The facts of this host, as this process sees it.

        Args:
            towards: address and port of rank 0; None: not known.
        """
        gpus, driver = _gpus()
        return cls(
            socket.gethostname(),
            _versions(driver),
            *_source(),
            gpus,
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            round(_memory_bytes() / 2**30, 1),
            round(free_gib(SHARED_MEMORY) or 0.0, 2),
            os.environ.get("OMP_NUM_THREADS", ""),
            _addresses(towards),
        )

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Facts:
        """Read what :meth:`values` gave."""
        return cls(**values | {"gpus": tuple(Gpu(**gpu) for gpu in values["gpus"])})

    def values(self) -> dict[str, Any]:
        """As values of JSON."""
        return asdict(self)


def version_of(package: str) -> str:
    """Version of an installed distribution, or `not installed`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def free_gib(path: Path) -> float | None:
    """Free space for this user, in GiB, on the disk that a path lies on or would lie on; None: it does not say."""
    for folder in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free / 2**30
    return None


def _versions(driver: str) -> dict[str, str]:
    return {
        "maskmatch_scale": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "CUDA of torch": str(torch.version.cuda or "none"),
        "driver": driver or "none",
        **{name: version_of(name) for name in PACKAGES},
    }


@lru_cache(maxsize=1)
def _source() -> tuple[str, str]:
    """Digest of the package's code, and the folder that it is in."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16], str(folder)


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    """The GPUs that are visible, and the version of their driver."""
    if not torch.cuda.is_available():
        return (), ""
    said = _nvidia_smi()
    found = []
    for index in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(index)
        clock, power, _ = said.get(str(seen.uuid).removeprefix("GPU-"), ("", "", ""))
        found.append(Gpu(seen.name, round(seen.total_memory / 2**30), _whole(clock), _whole(power)))
    return tuple(found), next((driver for _, _, driver in said.values()), "")


def _nvidia_smi() -> dict[str, tuple[str, str, str]]:
    """Clock in MHz, power in W and driver of each GPU by its UUID; empty where nvidia-smi does not answer."""
    try:
        asked = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_ANSWER_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [line.split(", ") for line in asked.stdout.splitlines()]
    return {row[0].removeprefix("GPU-"): (row[1], row[2], row[3]) for row in rows if len(row) == len(_QUERY)}


def _whole(text: str) -> int | None:
    try:
        return round(float(text))
    except ValueError:  # "[N/A]"
        return None


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _addresses(towards: tuple[str, int] | None) -> dict[str, str]:
    """What the name of this host stands for, and from where it would reach rank 0. Nothing is sent."""
    found = {}
    with suppress(OSError):
        found["own"] = str(socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)[0][4][0])
    if towards is not None:
        with suppress(OSError):
            family, kind, _, _, address = socket.getaddrinfo(*towards, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(address)
                found["towards"] = str(probe.getsockname()[0])
    if "towards" in found and (interface := _interface(found["towards"])):
        found["interface"] = interface
    return found


def _interface(address: str) -> str | None:
    """Name of the network interface with an address; None: not known."""
    try:
        asked = subprocess.run(
            ["ip", "-json", "address"], capture_output=True, text=True, timeout=_ANSWER_S, check=True
        )
        links = json.loads(asked.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return next(
        (link["ifname"] for link in links for one in link.get("addr_info", ()) if one.get("local") == address), None
    )
