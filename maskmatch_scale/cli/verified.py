"""What `maskmatch shards verify` says besides faults: how often each class occurs, and what is warned of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from maskmatch_scale.data.shards.index import ShardIndex

    Labels = Mapping[str, NDArray[np.int64]]
    """By labelled stream int64 (2, classes + 1): pixels of each class, and samples with some; last ignored ones."""


def print_labels(index: ShardIndex, labels: Labels) -> None:
    """Print a table of each labelled stream: the share of pixels of each class, and the samples that have some."""
    for name, counts in labels.items():
        pixels, samples = counts.tolist()
        table = Table(title=Text(f"label maps of {name}"))
        table.add_column("class")
        for column in ("pixels", "in samples"):
            table.add_column(column, justify="right")
        for label, count, having in zip(index.classes, pixels[:-1], samples[:-1], strict=True):
            table.add_row(Text(label), _share(count, sum(pixels)), str(having))
        table.add_section()
        table.add_row("ignored", _share(pixels[-1], sum(pixels)), str(samples[-1]))
        Console().print(table)


def warnings_of(index: ShardIndex, labels: Labels) -> list[str]:
    """Classes that never occur in a stream, and mostly ignored pixels, a line each."""
    from maskmatch_scale.data.shards.label_pixels import pixel_warnings

    return [
        line
        for name, counts in labels.items()
        for line in pixel_warnings(f"stream {name!r}", counts[0].tolist(), index.classes)
    ]


def as_json(index: ShardIndex, labels: Labels, faults: int) -> dict[str, Any]:
    """The same as JSON values."""
    streams: dict[str, Any] = {name: {"samples": stream.samples} for name, stream in index.streams.items()}
    for name, counts in labels.items():
        pixels, samples = counts.tolist()
        streams[name] |= {
            "class_pixels": dict(zip(index.classes, pixels[:-1], strict=True)),
            "class_samples": dict(zip(index.classes, samples[:-1], strict=True)),
            "ignored_pixels": pixels[-1],
        }
    total = sum(stream.samples for stream in index.streams.values())
    return {"samples": total, "faults": faults, "streams": streams, "warnings": warnings_of(index, labels)}


def _share(count: int, of: int) -> str:
    share = count / of if of else 0.0
    return "< 0.01%" if 0 < share < 0.0001 else f"{share:.2%}"
