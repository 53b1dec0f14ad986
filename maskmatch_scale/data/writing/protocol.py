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
        class_pixels: of the label map, pixels of each class, and last those that are ignored. The writer counts them; a
            source leaves them out.
    """

    key: str
    image: bytes
    extension: str
    label: bytes | None = None
    class_pixels: tuple[int, ...] | None = None


class LeftOut(Exception):  # noqa: N818 - no error
    """There is no sample of an item, and nothing is wrong with it: it is left out, and listed with those that are bad.

    Attributes:
        reason: one of :data:`LEFT_OUT`.
    """

    def __init__(self, reason: str, message: str) -> None:
        assert reason in LEFT_OUT, reason
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        """A process of the writer sends it by pickle."""
        return type(self), (self.reason, str(self))


LEFT_OUT = {"no_data": "have no data", "all_ignored": "have nothing but ignored pixels"}
"""Why an item is left out, in words that follow `tiles`."""


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

        It raises :class:`maskmatch_scale.data.faults.BadSample` for an item that cannot be used, :class:`LeftOut` for
        one that should not be, and any other exception to end the writing.
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


@dataclass(frozen=True)
class Added:
    """What a data source has besides the samples that a folder has already.

    Attributes:
        streams: the new samples, in the order of their shards; streams of none are left out.
        notes: what the user should know of samples that are in the folder, a line each.
    """

    streams: Mapping[str, StreamItems]
    notes: tuple[str, ...] = ()


@runtime_checkable
class Appends(Protocol):
    """A data source that knows its samples again by their keys."""

    def added(self, out: Path, keys: Mapping[str, Mapping[str, int]], *, workers: int, progress: bool) -> Added:
        """The samples that are not in a folder which this source has written before, with fewer files.

        A sample that is in the folder stays in its stream. What the source keeps in `out` has to be written whole or
        not at all, and a second call has the same result as one.

        Args:
            out: the folder, locked.
            keys: of its samples, by stream, with the bytes of the stored image. Samples that were left out as bad are
                not among them: they are tried again.
            workers: threads or processes to use.
            progress: whether to report on stderr.
        """
