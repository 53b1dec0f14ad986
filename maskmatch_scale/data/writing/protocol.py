"""What a data source is: how it describes its samples, and how one becomes an image and a label map.

Decision: docs/decisions/0030-a-stream-is-a-list-of-shards.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from maskmatch_scale.data.images.bands import Band


@dataclass(frozen=True)
class EncodedSample:
    """One sample, ready to be stored.

    Attributes:
        key: unique in its stream; no dot and no slash.
        image: an encoded image.
        extension: one of :data:`maskmatch_scale.data.shards.tar.IMAGE_EXTENSIONS`; `png` only where there is no label.
        label: an 8-bit single-channel PNG of class values, or None.
    """

    key: str
    image: bytes
    extension: str
    label: bytes | None = None


@dataclass(frozen=True)
class StreamItems:
    """The samples of one stream before they are rendered.

    Attributes:
        labelled: whether every sample of the stream has a label map.
        items: a small picklable description of each sample, in the order of the shards.
    """

    labelled: bool
    items: Sequence[Any]


class DataSource(Protocol):
    """Where samples come from. `maskmatch_scale/scores/source.py` is an example that makes its samples itself,
    `sources/image_files.py` one that reads files.
    """

    @property
    def name(self) -> str:
        """Written to the index."""

    @property
    def settings(self) -> Mapping[str, object]:
        """Everything the bytes depend on, as JSON values. Two sources of equal settings write equal shards."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label value."""

    @property
    def palette(self) -> tuple[tuple[int, int, int], ...]:
        """One RGB colour a class, 0–255."""

    @property
    def ignore_index(self) -> int:
        """Label value of ignored pixels."""

    @property
    def streams(self) -> Mapping[str, StreamItems]:
        """The streams by name."""

    @property
    def render(self) -> Callable[[Any], EncodedSample]:
        """A picklable pure function from one item of a stream to its sample; it runs in another process.

        It raises :class:`maskmatch_scale.data.faults.BadSample` for an item that cannot be used, and any other
        exception to end the writing.
        """


@runtime_checkable
class HasBands(Protocol):
    """A data source whose images may have bands: TIFFs of one page a band."""

    @property
    def bands(self) -> tuple[Band, ...]:
        """What the pages of an image hold; none if images are plain ones."""


@runtime_checkable
class Prepares(Protocol):
    """A data source that looks at its samples before they are cut into shards: drops duplicates, sets the order."""

    def prepare(self, out: Path, *, resumed: bool, workers: int, progress: bool) -> Mapping[str, StreamItems]:
        """The streams as they are to be written, in place of `streams`.

        Called once, while `out` is locked, before anything is rendered, and not if the folder is finished. The result
        must depend on the settings alone. What the source keeps in `out` has to be written whole or not at all.

        Args:
            out: the folder that is written.
            resumed: whether an earlier writer with the same settings was at work in `out`, and so may have kept
                something there.
            workers: threads or processes to use.
            progress: whether to report on stderr.
        """
