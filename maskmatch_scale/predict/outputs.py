"""The files of one predicted image, written while its rows come, each whole or not at all."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from maskmatch_scale.data.images.tiff import TiffImage
from maskmatch_scale.evaluation.save_pictures import flat_palette, save_map
from maskmatch_scale.files import file_whole, name_of_unfinished, write_whole
from maskmatch_scale.predict.overlay import Overlay
from maskmatch_scale.predict.polygons import coco_annotations, geojson_features
from maskmatch_scale.predict.reading import OpenImage
from maskmatch_scale.predict.rows import NO_DATA, Rows
from maskmatch_scale.predict.write_tiff import write_tiff

Polygons = Literal["coco", "geojson"]
_ENDINGS = {
    "ids": ("png", "tif"),
    "confidence": ("png", "tif"),
    "overlay": ("jpg",),
    "probabilities": ("npz",),
    "coco": ("json",),
    "geojson": ("geojson",),
}
"""By kind: of most images, and of TIFFs."""


@dataclass(frozen=True)
class Wanted:
    """Which outputs are written beside the classes."""

    overlay: bool = True
    confidence: bool = True
    probabilities: bool = False
    polygons: tuple[Polygons, ...] = ()


class Sink(Protocol):
    """What takes the rows of a prediction."""

    def add(self, rows: Rows) -> None:
        """Take the next rows."""


@dataclass(frozen=True)
class Outputs:
    """The files of predictions below one folder.

    Args:
        folder: DIR.
        wanted: which.
        classes: their names.
        palette: their colours, RGB.
        num_classes: number of logits.
        overlay_px: longest side of an overlay.
    """

    folder: Path
    wanted: Wanted
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    num_classes: int
    overlay_px: int
    _left: dict[Path, dict[str, list[Path]]] = field(default_factory=dict, repr=False, compare=False)

    def paths(self, name: str, *, tiff: bool) -> dict[str, Path]:
        """The files of an image by their kind.

        Args:
            name: of its outputs.
            tiff: whether it is a TIFF, whose maps are TIFFs too.
        """
        wanted = {"ids": True} | {
            kind: getattr(self.wanted, kind) for kind in ("confidence", "overlay", "probabilities")
        }
        kinds = [*(kind for kind in wanted if wanted[kind]), *self.wanted.polygons]
        return {kind: self.folder / kind / f"{name}.{_ENDINGS[kind][-1 if tiff else 0]}" for kind in kinds}

    def remove(self, name: str) -> None:
        """Remove all files of an image, also of kinds that are not wanted now, and what a killed process left of them.

        Raises:
            OSError: a file cannot be removed.
        """
        for kind, endings in _ENDINGS.items():
            for ending in endings:
                path = self.folder / kind / f"{name}.{ending}"
                with suppress(NotADirectoryError):
                    path.unlink(missing_ok=True)
                for left in self._left_in(path.parent).get(path.name.lstrip("."), ()):
                    left.unlink(missing_ok=True)

    def _left_in(self, folder: Path) -> dict[str, list[Path]]:
        """Files of killed processes in a folder, by the name that each was to have. Each folder is listed once."""
        if folder not in self._left:
            found = self._left[folder] = {}
            with suppress(FileNotFoundError, NotADirectoryError):
                for path in folder.iterdir():
                    if name := name_of_unfinished(path.name):
                        found.setdefault(name, []).append(path)
        return self._left[folder]

    def finished(self, name: str, *, tiff: bool, since_ns: int) -> bool:
        """Whether all files of an image are there and were not written before a time."""
        try:
            return all(path.stat().st_mtime_ns >= since_ns for path in self.paths(name, tiff=tiff).values())
        except OSError:
            return False

    @contextmanager
    def writing(self, name: str, image: OpenImage) -> Iterator[Callable[[Rows], None]]:
        """Write the files of an image while the body gives its rows.

        Yields:
            A function that takes the next rows.

        Raises:
            OSError: a file cannot be written.
        """
        paths = self.paths(name, tiff=isinstance(image, TiffImage))
        for path in paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            sinks = [stack.enter_context(sink) for sink in self._sinks(paths, name, image)]

            def add(rows: Rows) -> None:
                for sink in sinks:
                    sink.add(rows)

            yield add

    def _sinks(self, paths: dict[str, Path], name: str, image: OpenImage) -> Iterator[AbstractContextManager[Sink]]:
        if isinstance(image, TiffImage):
            yield _tiff_map(paths["ids"], image, lambda rows: rows.classes, self.palette)
            if "confidence" in paths:
                yield _tiff_map(paths["confidence"], image, lambda rows: rows.confidence)
        elif "confidence" in paths:
            yield _confidence_png(paths["confidence"], image)
        if "probabilities" in paths:
            yield _probabilities(paths["probabilities"], image, self.num_classes, self.classes)
        if "overlay" in paths:
            yield self._overlay(paths["overlay"], image)
        if self.wanted.polygons or not isinstance(image, TiffImage):
            yield self._whole(paths, name, image)

    @contextmanager
    def _overlay(self, path: Path, image: OpenImage) -> Iterator[Sink]:
        overlay = Overlay(image, self.classes, self.palette, self.overlay_px)
        yield overlay
        write_whole(path, overlay.jpeg())

    @contextmanager
    def _whole(self, paths: dict[str, Path], name: str, image: OpenImage) -> Iterator[Sink]:
        """What is made of the whole map of classes."""
        whole = _Whole(image.size_px, lambda rows: rows.classes)
        yield whole
        if "coco" in paths:
            write_whole(paths["coco"], coco_annotations(whole.values, name, self.classes))
        if "geojson" in paths:
            with file_whole(paths["geojson"]) as beside:
                geojson_features(whole.values, self.classes, image.georeference, beside)
        if not isinstance(image, TiffImage):
            save_map(torch.from_numpy(whole.values), flat_palette(self.palette), paths["ids"])


class _Whole:
    """Keeps one map of an image in memory.

    Args:
        size_px: height and width.
        choose: the map's part of some rows, uint8 (h, W).
    """

    def __init__(self, size_px: tuple[int, int], choose: Callable[[Rows], NDArray[np.uint8]]) -> None:
        self.values = np.empty(size_px, np.uint8)
        self._choose = choose

    def add(self, rows: Rows) -> None:
        """Take the next rows."""
        self.values[rows.top : rows.top + len(rows.classes)] = self._choose(rows)


@contextmanager
def _confidence_png(path: Path, image: OpenImage) -> Iterator[Sink]:
    whole = _Whole(image.size_px, lambda rows: rows.confidence)
    yield whole
    grey = [level for level in range(256) for _ in range(3)]
    save_map(torch.from_numpy(whole.values), grey, path)


class _TiffMap:
    def __init__(self, add: Callable[[NDArray[np.uint8]], None], choose: Callable[[Rows], NDArray[np.uint8]]) -> None:
        self._add, self._choose = add, choose

    def add(self, rows: Rows) -> None:
        """Take the next rows."""
        self._add(self._choose(rows))


@contextmanager
def _tiff_map(
    path: Path,
    image: TiffImage,
    choose: Callable[[Rows], NDArray[np.uint8]],
    palette: tuple[tuple[int, int, int], ...] | None = None,
) -> Iterator[Sink]:
    no_data = NO_DATA if palette is not None and image.may_lack_data else None
    with (
        file_whole(path) as beside,
        write_tiff(beside, image.size_px, image.georeference, palette=palette, no_data=no_data) as writer,
    ):
        yield _TiffMap(writer.add, choose)


class _Probabilities:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def add(self, rows: Rows) -> None:
        """Take the next rows."""
        assert rows.probabilities is not None
        self._file.write(rows.probabilities.data)


@contextmanager
def _probabilities(path: Path, image: OpenImage, num_classes: int, classes: tuple[str, ...]) -> Iterator[Sink]:
    """An npz, written row by row: `probabilities` float16 (H, W, classes), and `classes`, their names."""
    header = {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": (*image.size_px, num_classes)}
    with file_whole(path) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("classes.npy", "w") as file:
            np.lib.format.write_array(file, np.array(classes, dtype=np.str_), allow_pickle=False)
        with archive.open("probabilities.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_2_0(file, header)
            yield _Probabilities(file)
