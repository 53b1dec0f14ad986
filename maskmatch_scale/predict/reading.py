"""From an input to its images: what is read of a file, a shard or an address, and when."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PillowImage
from torch import Tensor

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.images.bands import RGB_NAMES, shown_names
from maskmatch_scale.data.images.decode import decode_image
from maskmatch_scale.data.images.file_bands import RGB_FILES, FileBands
from maskmatch_scale.data.images.image import decode_large
from maskmatch_scale.data.images.opening import MOST_WHOLE_PIXELS, bad
from maskmatch_scale.data.images.tiff import TiffImage, open_tiff
from maskmatch_scale.data.remote.fetch import read_bytes
from maskmatch_scale.data.remote.shard_cache import ShardCache
from maskmatch_scale.data.shards.folder import fetch_options
from maskmatch_scale.data.shards.tar import TarTable, read_table
from maskmatch_scale.evaluation.inference import WholeImage
from maskmatch_scale.predict.inputs import Shard, Share
from maskmatch_scale.predict.naming import safe_path
from maskmatch_scale.recipe import DataRecipe
from maskmatch_scale.redact import is_remote, shown


@dataclass(frozen=True)
class DecodedImage(WholeImage):
    """An image that is in memory, decoded."""

    shown: tuple[int, ...] = (0, 1, 2)
    """Channels that a picture shows as red, green and blue."""
    georeference: ClassVar[None] = None

    def valid(self, rows: slice) -> NDArray[np.bool_] | None:
        """None: all pixels of all rows have data."""
        return None

    @property
    def may_lack_data(self) -> bool:
        """Whether some pixels may have no data: they all have."""
        return False

    def shrunk(self, height: int, width: int) -> PillowImage.Image:
        """The image in another size, its shown channels.

        Where it is much larger, some of its rows and columns are passed over.
        """
        own_height, own_width = self.size_px
        step = max(1, min(own_height // height, own_width // width) // 2)
        some: Tensor = self.pixels[:, ::step, ::step][list(self.shown)]
        picture = PillowImage.fromarray(np.ascontiguousarray(some.permute(1, 2, 0).numpy()))
        return (
            picture if picture.size == (width, height) else picture.resize((width, height), PillowImage.Resampling.BOX)
        )


OpenImage = DecodedImage | TiffImage
"""An image for :class:`maskmatch_scale.evaluation.inference.Inference`, and what outputs ask of it."""


@dataclass(frozen=True)
class Task:
    """One image that is to be predicted."""

    name: str
    """Of its outputs: a relative path without ending."""
    where: str
    """Of the image, for messages."""
    open: Callable[[], AbstractContextManager[OpenImage]]
    """Reads it. Raises BadSample, then or when parts of it are read."""
    share: float = 1.0
    """How much of a step of progress it is."""
    fault: BadSample | None = None
    """Why it cannot be predicted, if that is known before it is opened; `open` raises it."""


@dataclass(frozen=True)
class Reader:
    """Finds and reads the images of inputs.

    Args:
        data: how inputs on other machines are fetched.
        exif_orientation: whether images are turned as their EXIF orientation says.
        bands: channels of the model, and which bands of files they are.
        note: called with a line for the user.
    """

    data: DataRecipe
    exif_orientation: bool
    bands: FileBands = RGB_FILES
    note: Callable[[str], None] = lambda line: None

    def count(self, share: Share) -> int:
        """Number of images in a share; 1 for a shard that must be fetched and that no index lists."""
        shard = share.input
        if not isinstance(shard, Shard):
            return 1
        samples = shard.samples
        if samples is None:
            if is_remote(shard.location):
                return 1
            try:
                with Path(shard.location).open("rb") as file:
                    samples = len(read_table(file, shard.location, labelled=False))
            except (OSError, BadSample):
                return 1  # said when it is its turn
        return len(range(share.first, samples, share.step))

    def tasks(self, share: Share, name: str) -> Iterator[Task]:
        """The images of a share, in order. A shard that cannot be read is one task, which fails.

        Args:
            share: of an input.
            name: of the input's outputs.
        """
        if isinstance(share.input, Shard):
            yield from self._samples(share, share.input, name)
        else:
            file = share.input
            yield Task(name, shown(file.location), partial(self._file, file.location, is_tiff=file.is_tiff))

    def _samples(self, share: Share, shard: Shard, name: str) -> Iterator[Task]:
        where = shown(shard.location)
        known = shard.samples is not None or not is_remote(shard.location)
        try:
            with self._opened(shard) as file:
                table = read_table(file, where, labelled=False)
                places = range(share.first, len(table), share.step)
                for place in places:
                    sample = f"{where}: {table.key(place)}"
                    yield Task(
                        f"{name}/{safe_path(table.key(place))}",
                        sample,
                        partial(self._sample, shard, table, file, place, sample),
                        1.0 if known else 1 / len(places),
                        table.fault(place),
                    )
                if share.first == 0 and (lost := _lost(table, shard)):
                    yield _failing(name, where, lost, share=0.0)
        except OSError as error:
            yield _failing(name, where, BadSample("shard_unreadable", f"{where}: {error.strerror}"))
        except BadSample as fault:
            yield _failing(name, where, fault)

    def _opened(self, shard: Shard) -> BinaryIO:
        if is_remote(shard.location):
            return ShardCache(fetch_options(self.data)).open(shard.location, shard.bytes, shard.sha256)
        return Path(shard.location).open("rb")

    @contextmanager
    def _sample(self, shard: Shard, table: TarTable, file: BinaryIO, place: int, where: str) -> Iterator[OpenImage]:
        data, _ = table.read(file, place)
        if shard.bands is None and self.bands.bands:  # no index says what its pages are
            yield self._with_bands(torch.from_numpy(self.bands.read(data, where)))
            return
        channels = self.bands.of_pages(shard.bands or ())
        if channels is None:
            yield self._decoded(data, where, any_format=False)
        else:
            yield self._with_bands(decode_image(data, where, channels=channels, max_pixels=MOST_WHOLE_PIXELS))

    def _with_bands(self, planes: Tensor) -> DecodedImage:
        names = self.bands.names
        return DecodedImage(planes, tuple(names.index(name) for name in shown_names(names)))

    @contextmanager
    def _file(self, location: str, *, is_tiff: bool) -> Iterator[OpenImage]:
        data: bytes | Path = Path(location)
        if is_remote(location):
            try:
                data = read_bytes(location, fetch_options(self.data))
            except BadSample:
                raise
            except DataError as error:
                raise BadSample("unreachable", str(error)) from None
        else:
            _check_file(location)
        if is_tiff:
            with open_tiff(data, shown(location), self.bands) as image:
                if image.unused is not None:
                    self.note(image.unused)
                yield image
        elif self.bands.bands:
            yield self._with_bands(torch.from_numpy(self.bands.read(data, shown(location))))
        elif self.bands.given is not None and self.bands.given[: len(RGB_NAMES)] != RGB_NAMES:
            what = f"--bands {','.join(self.bands.given)} says which bands of TIFFs are red, green and blue"
            raise bad("not_an_image", shown(location), f"{what}, and this is none; predict it without that option")
        else:
            # Formats of Pillow that are seldom looked at by anyone are left to files of the user's own.
            yield self._decoded(data, shown(location), any_format=isinstance(data, Path))

    def _decoded(self, data: bytes | Path, where: str, *, any_format: bool) -> DecodedImage:
        planes = decode_large(data, where, exif_orientation=self.exif_orientation, any_format=any_format)
        return DecodedImage(torch.from_numpy(planes))


def _check_file(location: str) -> None:
    """Raise :class:`BadSample` for what is no file. Opening a named pipe would wait for ever."""
    try:
        if stat.S_ISREG(Path(location).stat().st_mode):
            return
        what = "not a file"
    except FileNotFoundError:
        what = "no such file"
    except (OSError, ValueError) as error:  # no permission, a name that is too long, one with a null character
        what = getattr(error, "strerror", None) or str(error)
    raise bad("no_image", location, what)


def _lost(table: TarTable, shard: Shard) -> BadSample | None:
    """Why samples of a shard may be missing from its table; None if none are."""
    if shard.samples is not None and len(table) >= shard.samples:
        return None
    found = [] if shard.samples is None else [f"{len(table)} samples where the index says {shard.samples}"]
    found += [f"{table.damage}, and what follows is lost"] if table.damage else []
    return BadSample("truncated", f"{table.shard}: {': '.join(found)}; fetch or write it again") if found else None


def _failing(name: str, where: str, fault: BadSample, share: float = 1.0) -> Task:
    return Task(name, where, partial(_Fails, fault), share, fault)


class _Fails(AbstractContextManager[OpenImage]):
    """An image that cannot be opened.

    Args:
        fault: why.
    """

    def __init__(self, fault: BadSample) -> None:
        self._fault = fault

    def __enter__(self) -> OpenImage:
        raise self._fault

    def __exit__(self, *_: object) -> None:
        """Never called."""
