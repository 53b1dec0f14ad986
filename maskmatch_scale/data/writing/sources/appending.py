"""Which image files are new to a shard folder that was written from fewer of them.

A file is known by its key (:mod:`~maskmatch_scale.data.writing.sources.keys`), which is in the headers of the shards;
one that was dropped as a duplicate, by its path in `duplicates.jsonl`. What became of a sample then stays so: if a
sample that was held out would be chosen otherwise among more files, or if an image has got a label map since, it is
counted and left where it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.opening import PNG, is_stored, start_of
from maskmatch_scale.data.pool import in_threads
from maskmatch_scale.data.writing.protocol import StreamItems
from maskmatch_scale.data.writing.sources.keys import keys_of, variants_of
from maskmatch_scale.data.writing.sources.read_files import FileItem


@dataclass
class Compared:
    """The samples of a source, compared with those of a folder.

    Attributes:
        new: by stream.
        known: streams of the folder, and the items of the source that are in them.
        stored_bytes: of the images of these items, in the folder.
        moved: items, with the stream that they are in and the one that they would be in now.
        lost: how many samples of the folder the source has no file of.
    """

    new: dict[str, list[FileItem]] = field(default_factory=dict)
    known: list[tuple[str, FileItem]] = field(default_factory=list)
    stored_bytes: dict[FileItem, int] = field(default_factory=dict)
    moved: list[tuple[FileItem, str, str]] = field(default_factory=list)
    lost: int = 0

    @property
    def unmoved(self) -> list[FileItem]:
        """Items that are in the stream in which they would be now."""
        moved = {item for item, _, _ in self.moved}
        return [item for _, item in self.known if item not in moved]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know, a line each."""
        notes = []
        if self.lost:
            notes.append(f"{self.lost} samples of the folder have no file in the source any more; they stay in it")
        if self.moved:
            item, was, now = self.moved[0]
            notes.append(
                f"{len(self.moved)} samples of the folder would be in another stream now, such as {item.image} ({now}, "
                f"not {was}); they stay where they are, as they were written"
            )
        return tuple(notes)


def newer_files(root: Path, items: Sequence[FileItem], since: Path, threads: int) -> tuple[str, ...]:
    """A line on files of samples that were changed after a file was written; none if none was.

    Args:
        root: what their paths are relative to.
        items: the samples.
        since: the file.
        threads: that ask the file system.
    """
    then = since.stat().st_mtime_ns

    def newer(item: FileItem) -> str | None:
        for path in (item.image, item.label):
            with suppress(OSError, ValueError):  # a label may be no path
                if path is not None and (root / path).stat().st_mtime_ns > then:
                    return path
        return None

    found = [path for path in in_threads(newer, items, threads) if path is not None]
    if not found:
        return ()
    return (
        f"{len(found)} samples of the folder have files that were changed after {since}, such as {found[0]}; they stay "
        "as they were written",
    )


def other_images(root: Path, compared: Compared, threads: int) -> tuple[str, ...]:
    """A line on files that have another size than the image of this name in the folder; none if there are none.

    Their times may be older, if they are other images that were copied there.

    Args:
        root: what their paths are relative to.
        compared: with a folder in which images of the formats that can stay as they are do so.
        threads: that ask the file system.
    """

    def is_other(item: FileItem) -> bool:
        with suppress(OSError):
            path = root / item.image
            if path.stat().st_size != compared.stored_bytes[item]:
                start = start_of(path)  # its name may be that of another format
                return is_stored(start) and not (item.label is not None and start.startswith(PNG))
        return False

    items = compared.unmoved
    found = [item.image for item, other in zip(items, in_threads(is_other, items, threads), strict=True) if other]
    if not found:
        return ()
    return (
        f"{len(found)} samples of the folder have the name of another image of the source, such as {found[0]}, whose "
        "size is not that of the image that was written; these images are not written: give new ones other names, or "
        "write them to a folder of their own and put both together by `maskmatch shards merge`",
    )


def compare(
    streams: Mapping[str, StreamItems], keys: Mapping[str, Mapping[str, int]], dropped: AbstractSet[str]
) -> Compared:
    """Tell new samples from those that a folder has.

    Args:
        streams: all that the source has, of :class:`FileItem`.
        keys: of the folder, by stream.
        dropped: images that are not in the folder because they equal another one.

    Raises:
        DataError: it cannot be told which of two images is in the folder.
    """
    found = Compared()
    left = {name: dict(of_stream) for name, of_stream in keys.items()}
    unknown = [(name, item) for name, stream in streams.items() for item in stream.items]
    for other_streams in (False, True):  # all of a stream first: another image may have the same key in another one
        still_unknown = []
        for name, item in unknown:
            candidates = [of for of in left if (of != name) == other_streams]
            taken = ((of, _take(item, left[of])) for of in candidates)
            was, size = next(((of, size) for of, size in taken if size is not None), (None, 0))
            if was is None:
                still_unknown.append((name, item))
            else:
                found.known.append((was, item))
                found.stored_bytes[item] = size
                if was != name:
                    found.moved.append((item, was, name))
        unknown = still_unknown
    for name, item in unknown:
        if item.image not in dropped:
            found.new.setdefault(name, []).append(item)
    found.lost = sum(map(len, left.values()))
    return found


def is_kept(image: Mapping[str, str], keys: Mapping[str, Mapping[str, int]], key_root: str) -> bool:
    """Whether the image that another one equals is in a folder. It may have been left out as bad since, or be of an
    append that was never finished; then the other one is no duplicate.

    Args:
        image: its `stream` and path, `image`, as `duplicates.jsonl` names them.
        keys: of the folder, by stream.
        key_root: as in :func:`keys_of`.
    """
    (key,) = keys_of([image["image"]], key_root)
    return any(variant in keys.get(image["stream"], ()) for variant in variants_of(key, image["image"]))


def _take(item: FileItem, keys: dict[str, int]) -> int | None:
    """What one of these keys stands for, which is then taken out of them; None if an item has none of them."""
    plain, with_hash = variants_of(item.key, item.image)
    for key in (item.key, with_hash):
        if key in keys:
            return keys.pop(key)
    if plain in keys:
        # Another image has the same key without a hash now: which of them is in the folder?
        raise DataError(
            f"{item.image}: several images have the key {plain!r} now, and one of them is in the folder; rename those "
            "that are new, or write another folder"
        )
    return None
