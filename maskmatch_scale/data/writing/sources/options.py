"""Options that all data sets of image files take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """As the user gave them.

    Attributes:
        classes: names instead of the data set's own: a file, or a table of the package (:func:`load_classes`).
        id_map: label values instead of the data set's own: a file (:func:`load_id_map`).
        unknown_as_ignore: ignore label values that neither names.
        split_labelled, split_unlabelled, split_val: files in UniMatch's format.
        dev, val: labelled samples to hold out: a count or a share.
        split_seed: of the samples that are held out.
        max_side: longest side of an image, px; larger ones are shrunk.
        apply_exif: turn the pixels of photos upright that are stored turned (EXIF orientation).
        shuffle_seed: of the order of samples; negative keeps that of the data set.
        tile, overlap: side of the tiles into which images are cut, and how far they overlap, px; None: no tiles.
        keep_duplicates: write images of equal bytes as often as they are there.
        bands: names of the bands of the images (:func:`parse_bands`); None: images are plain ones.
        value_range: which of their values become 0 and 255 (:func:`parse_ranges`).
    """

    classes: str | None = None
    id_map: Path | None = None
    unknown_as_ignore: bool = False
    split_labelled: Path | None = None
    split_unlabelled: Path | None = None
    split_val: Path | None = None
    dev: str | None = None
    val: str | None = None
    split_seed: int = 0
    max_side: int | None = None
    tile: int | None = None
    overlap: int | None = None
    apply_exif: bool = False
    shuffle_seed: int = 0
    keep_duplicates: bool = False
    bands: str | None = None
    value_range: str | None = None
