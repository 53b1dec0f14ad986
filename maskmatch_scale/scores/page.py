"""One page: engraved, aged and encoded from a description that determines every byte."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.encode import encode_image, encode_label
from maskmatch_scale.data.writing import EncodedSample
from maskmatch_scale.scores.ageing import MARGIN, age, bend
from maskmatch_scale.scores.corpus import cut_measures, read_musicxml
from maskmatch_scale.scores.engraving import Style, downsample, engrave

MEASURES = 28
"""Measures engraved for a page: enough to fill a sheet of twice its height at any density of notes."""

_FULL = 0.8
"""A window of a sheet may become a page if it has at least this share of the ink of the window with the most ink."""


@dataclass(frozen=True)
class Page:
    """Everything that determines one page; its picklable description.

    Attributes:
        key: name of the sample.
        corpus: the corpus folder.
        piece: path of the score below `corpus`.
        work: identity of the work for splitting.
        first: first measure, from 1.
        font: verovio's music font.
        house_style: whether line widths and spacings are the default ones; otherwise they vary by page.
        labelled: whether the sample carries its label map.
        aged: whether the drawing is rotated, warped and made to look scanned.
        size: side of the page, px.
        seed: of the data set.
    """

    key: str
    corpus: Path
    piece: str
    work: str
    first: int
    font: str
    house_style: bool
    labelled: bool
    aged: bool
    size: int
    seed: int


def render_page(page: Page) -> EncodedSample:
    """Engrave, age and encode one page; the same bytes for the same page and versions of the libraries.

    Raises:
        DataError: verovio cannot read the piece.
    """
    rng = np.random.default_rng(hash_number(page.seed, page.key))
    style = Style(page.font) if page.house_style else _draw_style(page.font, rng)
    try:
        musicxml = cut_measures(read_musicxml(page.corpus / page.piece), page.first, page.first + MEASURES - 1)
        sheet = engrave(musicxml, style, page.size)
    except DataError as error:
        raise DataError(f"{page.piece}, measure {page.first}: {error}") from None
    overview = (sheet.raster(0, max(sheet.height, page.size), oversampling=1) > 0).astype(np.float32)
    top, verso_top = _draw_windows(overview, page.size, rng)
    if page.aged:
        ink, label = downsample(bend(sheet.raster(top, page.size, MARGIN), page.size, MARGIN, rng))
        verso = overview[verso_top : verso_top + page.size]
        scan = Image.fromarray(age(ink, verso, rng))
        image, extension = encode_image(scan, "JPEG", quality=int(rng.integers(45, 91))), "jpg"
    else:
        ink, label = downsample(sheet.raster(top, page.size))
        clean = Image.fromarray(np.rint(255 * (1 - ink)).astype(np.uint8))
        image, extension = encode_image(clean, "WEBP", lossless=True), "webp"
    return EncodedSample(page.key, image, extension, encode_label(label, compress_level=9) if page.labelled else None)


def hash_number(*parts: object) -> int:
    """A number of 64 bits that depends on nothing but the parts."""
    return int.from_bytes(hashlib.sha256("\n".join(map(str, parts)).encode()).digest()[:8], "big")


def _draw_windows(overview: NDArray[np.float32], size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Upper edges (px) of the page and of its verso: the page one of the full windows of the sheet, the verso any.

    Args:
        overview: float32 (height, size), 1 where the sheet has ink.
        size: height of a window, px.
        rng: the page's own generator.
    """
    ink_above = np.concatenate([[0.0], overview.sum(axis=1, dtype=np.float64).cumsum()])
    ink_in_window = ink_above[size:] - ink_above[:-size]
    full = np.flatnonzero(ink_in_window >= _FULL * ink_in_window.max())
    return int(rng.choice(full)), int(rng.integers(len(ink_in_window)))


def _draw_style(font: str, rng: np.random.Generator) -> Style:
    return Style(
        font,
        staff_space=float(rng.uniform(8, 10)),
        staff_line=float(rng.uniform(0.18, 0.26)),
        stem=float(rng.uniform(0.2, 0.3)),
        barline=float(rng.uniform(0.3, 0.45)),
        staff_spacing=int(rng.integers(5, 10)),
        note_spacing=float(rng.uniform(0.2, 0.3)),
    )
