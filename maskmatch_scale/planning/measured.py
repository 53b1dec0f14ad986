"""Rates that were measured on a machine (`planning/measure.py`), kept in a file.

Each operator was run by itself at a few sizes. Between them seconds are interpolated, by bytes or by products. An
operator that is not among them is taken for one that copies as many bytes.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from maskmatch_scale.errors import UserError
from maskmatch_scale.files import write_whole
from maskmatch_scale.planning import efficiency
from maskmatch_scale.planning.rates import Rates, SheetRates, kind_of
from maskmatch_scale.planning.recorder import Operation
from maskmatch_scale.planning.setting import Gpu, Link

FORMAT = 1
COPY = "aten.clone"
ADAMW = "AdamW"
THIN = 16.0
"""FLOPs for each byte below which a convolution has few products for each value, as a depthwise one."""


@dataclass(frozen=True)
class Point:
    """One operator at one size."""

    name: str
    """As `Operation.name`; of a convolution with few products for each value with ` thin` after it."""
    dtype: str
    """Such as `float32`."""
    flops: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class MeasuredGpu(Gpu):
    """A device of which operators were measured."""

    points: tuple[Point, ...] = ()
    is_cuda: bool = False
    """Whether a host launches its operations while the device works."""
    within: Link | None = None
    """Between the ranks of this machine; None: not measured."""


class MeasuredRates:
    """As `SheetRates`, from points."""

    def __init__(self, gpu: MeasuredGpu) -> None:
        self.launch_s = gpu.launch_s if gpu.is_cuda else 0.0
        self.network_share = 1.0
        self.overlaps = gpu.is_cuda
        self._curves: dict[tuple[str, str], list[Point]] = {}
        for point in sorted(gpu.points, key=lambda point: point.bytes):
            self._curves.setdefault((point.name, point.dtype), []).append(point)

    def seconds(self, operation: Operation) -> float:
        """Of the device."""
        dtype = str(operation.dtype).removeprefix("torch.")
        curve = self._curve(key_of(operation), dtype)
        if self.is_product(operation) and curve[-1].flops:
            return _along([(p.flops, p.seconds) for p in curve], operation.flops)
        return _along([(p.bytes, p.seconds) for p in curve], operation.bytes)

    def moving_s(self, moved: float) -> float:
        """Of reading and writing so many bytes."""
        return _along([(p.bytes, p.seconds) for p in self._curve(COPY, "float32")], moved)

    def adamw_s(self, parameters: float) -> float:
        """Of a step of AdamW on so many fp32 parameters."""
        curve = self._curve(ADAMW, "float32")
        return _along([(p.bytes, p.seconds) for p in curve], efficiency.ADAMW_BYTES * parameters)

    def is_product(self, operation: Operation) -> bool:
        """Whether it is bound by its products."""
        return operation.flops > 0 and not is_thin(operation)

    def _curve(self, name: str, dtype: str) -> list[Point]:
        for key in ((name, dtype), (name, "float32"), (COPY, dtype), (COPY, "float32")):
            if key in self._curves:
                return self._curves[key]
        raise UserError("the measurement has no figures of copying; measure again")


def rates_of(gpu: Gpu) -> Rates:
    """The rates of a device: measured ones if it has them."""
    return MeasuredRates(gpu) if isinstance(gpu, MeasuredGpu) else SheetRates(gpu)


def is_thin(operation: Operation) -> bool:
    """Whether it is a convolution with few products for each byte."""
    return kind_of(operation.name) == "convolution" and operation.flops < THIN * operation.bytes


def key_of(operation: Operation) -> str:
    """Under what name its seconds are kept."""
    return f"{operation.name} thin" if is_thin(operation) else operation.name


def _along(points: Sequence[tuple[float, float]], size: float) -> float:
    """Seconds at a size: on the line between two measured ones, and in proportion beyond the last."""
    sizes = [point[0] for point in points]
    at = bisect_left(sizes, size)
    if at == len(points):
        return points[-1][1] * size / sizes[-1]
    if at == 0:
        return points[0][1]
    (low, fast), (high, slow) = points[at - 1], points[at]
    return fast + (slow - fast) * (size - low) / (high - low)


def write_measurement(gpu: MeasuredGpu, path: Path) -> None:
    """Write it as JSON."""
    write_whole(path, json.dumps({"format": FORMAT, **asdict(gpu)}, indent=1))


def read_measurement(path: Path) -> MeasuredGpu:
    """Read what :func:`write_measurement` wrote.

    Raises:
        UserError: there is no such file, or it is not such a measurement.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        points = tuple(Point(**point) for point in content.pop("points"))
        within = content.pop("within")
        found = MeasuredGpu(points=points, within=within and Link(**within), **content)
        MeasuredRates(found).moving_s(1)
    except OSError as error:
        raise UserError(f"--measured {path}: {error.strerror}; write it with --measure {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--measured {path}: not a measurement ({error}); write it with --measure {path}") from None
    return found
