"""A data source that costs nothing to render, and what lies in a folder."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.writing import EncodedSample, StreamItems


@dataclass(frozen=True)
class Item:
    number: int
    labelled: bool
    kill_file: str = ""
    bad: bool = False


@dataclass(frozen=True)
class Squares:
    """Grey squares. `kill_at`: the process that renders this unlabelled sample dies by SIGKILL, once.

    `bad`: unlabelled samples that cannot be used.
    """

    seed: int = 0
    labelled: int = 5
    unlabelled: int = 20
    kill_at: int = -1
    kill_file: str = ""
    bad: tuple[int, ...] = ()

    name: str = field(default="squares", init=False)
    classes: tuple[str, ...] = field(default=("paper", "ink"), init=False)
    palette: tuple[tuple[int, int, int], ...] = field(default=((255, 255, 255), (0, 0, 0)), init=False)
    ignore_index: int = field(default=255, init=False)

    @property
    def settings(self) -> Mapping[str, object]:
        return {"seed": self.seed, "labelled": self.labelled, "unlabelled": self.unlabelled}

    @property
    def streams(self) -> Mapping[str, StreamItems]:
        return {
            "labelled": StreamItems(True, [Item(n, True) for n in range(self.labelled)]),
            "unlabelled": StreamItems(
                False,
                [
                    Item(n, False, self.kill_file if n == self.kill_at else "", n in self.bad)
                    for n in range(self.unlabelled)
                ],
            ),
        }

    @staticmethod
    def render(item: Item) -> EncodedSample:
        if item.kill_file and not Path(item.kill_file).exists():
            Path(item.kill_file).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if item.bad:
            raise BadSample("not_an_image", f"square {item.number}: not square")
        label = png(1) if item.labelled else None
        return EncodedSample(f"square-{item.number:04d}", jpeg(item.number), "jpg", label)


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, "JPEG")
    return buffer.getvalue()


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, "PNG")
    return buffer.getvalue()


def keys(folder: Path, name: str) -> list[str]:
    """Of a stream, as training reads it."""
    # Not with the others: processes that render squares need no torch.
    from maskmatch_scale.data.shards.reading import ShardStream

    stream = ShardStream(folder, name)
    return [stream[number].key for number in range(len(stream))]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
