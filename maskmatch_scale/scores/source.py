"""Pages of real scores with pixel-exact labels: optical music recognition, the task of DeepScores.

What it is. The MusicXML scores that the music21 package ships (chorales by Bach, madrigals by Monteverdi, music of the
trecento, quartets, piano pieces, songs) are engraved by verovio, drawn by resvg and aged like scans. A page is a square
of 512 px with about 9 px a staff space, cut out of a longer sheet so that it is full of music.

The case it stands for: labels come from one source, the archive from many. Labelled pages are set in one font by one
engraver, `unlabelled`, `dev` and `val` pages in four fonts and varying line widths, `val_font` in a fifth that occurs
nowhere else. `dev` is for choosing hyper-parameters; `val` and `val_font` are for the figures one reports.

Classes, by the value of the label map (where two overlap, the one drawn on top):
    0 background · 1 staff: staff lines and ledger lines · 2 black_notehead: quarter notes and shorter ·
    3 hollow_notehead: half, whole and double whole notes · 4 stem · 5 beam_flag: beams, flags, tremolo strokes ·
    6 rest · 7 clef · 8 key_accidental: those of the key signature · 9 accidental: those before a note ·
    10 slur_tie · 11 barline: with repeat dots, and the line that joins the staves of a system · 12 other: meter
    signatures, dots, articulation, fermatas, dynamics, hairpins, ornaments, tuplet figures, braces, brackets.
    There is no text on the pages, and no pixel is ignored.

Fonts: Leipzig (`labelled`, and a quarter of `unlabelled`, `dev` and `val`), Bravura, Leland, Petaluma; Gootville
(`val_font`).

Split: by work, not by page (what counts as one work: `scores_corpus.find_pieces`). A seeded hash orders the works of
each repertory and deals them to `labelled`, `dev`, `val`, `val_font`; `unlabelled` gets those that remain. A work with
more than `_ANTHOLOGY` files (Bach's passions and the chorales that share their tunes) is always unlabelled. Labelled
pages are those that show the most kinds of symbols among a few that the hash picks: so somebody who can afford to label
two pages would choose them.

Ageing (`ageing.py`): rotation to ±1.5° and a slow warp, image and label alike; bled and worn ink by a locally varying
threshold, specks, paper tone and grain, bleed-through of the verso, uneven light, blur, noise, JPEG of quality 45–90.

Licences: verovio LGPL-3, music21 BSD, resvg-py MIT, the music fonts SIL OFL. The pieces are mostly in the public
domain; their encodings carry notices of their own and some forbid commercial use (music21's `corpus/license.txt`). So
pages are rendered at set-up and are not to be committed or passed on.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.writing.write import EncodedSample, Stream
from maskmatch_scale.scores.ageing import MARGIN, age, bend, encode_jpeg
from maskmatch_scale.scores.corpus import (
    REPERTORIES,
    Piece,
    corpus_folder,
    cut_measures,
    find_pieces,
    read_musicxml,
)
from maskmatch_scale.scores.engraving import (
    CLASSES,
    Style,
    downsample,
    engrave,
)

REVISION = 3
"""Raise it with every change of this source that changes pages: folders of older pages are then refused."""

FONTS = ("Leipzig", "Bravura", "Leland", "Petaluma")
"""Fonts of the archive; the first is that of the labelled pages."""

HELD_OUT_FONT = "Gootville"
"""The font of `val_font`."""

PALETTE = (
    (255, 255, 255),
    (170, 170, 170),
    (220, 30, 30),
    (255, 140, 0),
    (30, 90, 220),
    (0, 160, 60),
    (150, 60, 200),
    (120, 70, 20),
    (230, 60, 170),
    (0, 180, 200),
    (150, 180, 0),
    (60, 60, 90),
    (255, 205, 60),
)

_SHARES = {"chorale": 0.3, "madrigal": 0.15, "medieval": 0.15, "instrumental": 0.4}
"""Share of a stream's pages from each repertory, as far as it has so many."""

_MEASURES = 28
"""Measures engraved for a page: enough to fill a sheet of twice its height at any density of notes."""

_STEP = 24
"""Measures from the start of one page of a piece to the next."""

_ANTHOLOGY = 8
_HELD_OUT_PAGES_A_WORK = 2
_FULL = 0.8
"""Share of the most ink that any window of a sheet holds, from which on a window may become a page."""

_LABELLED_CHOICE = 3
"""Candidates looked at for each labelled page."""


@dataclass(frozen=True)
class Page:
    """Everything that determines one page; its picklable description.

    Attributes:
        key: name of the sample.
        piece: path of the score below `corpus`.
        work: identity of the work for splitting.
        first: first measure, from 1.
        font: verovio's music font.
        house_style: engraved with default widths; otherwise widths and spacings vary by page.
        labelled: whether the sample carries its label map.
        aged: False leaves the drawing clean: no geometry, no scan.
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


@dataclass(frozen=True)
class ScoresSource:
    """Streams of score pages. A `Source` for :func:`maskmatch_scale.data.writing.write.write_shards`.

    Args:
        seed: of the split, of engraving styles and of the ageing.
        labelled, unlabelled, dev, val, val_font: pages in each stream; 0 leaves a stream out.
        size: side of a page, px.
        aged: False leaves pages clean, as drawn.

    Raises:
        DataError: the `quickstart` extra is not installed, or more pages are asked for than the corpus has.
    """

    seed: int = 0
    labelled: int = 16
    unlabelled: int = 290
    dev: int = 16
    val: int = 32
    val_font: int = 16
    size: int = 512
    aged: bool = True

    name: str = field(default="scores", init=False)
    classes: tuple[str, ...] = field(default=CLASSES, init=False)
    palette: tuple[tuple[int, int, int], ...] = field(default=PALETTE, init=False)
    ignore_index: int = field(default=255, init=False)

    @property
    def settings(self) -> Mapping[str, object]:
        """What the pages depend on: the arguments, and the versions of the packages that draw them."""
        asked = ("seed", "labelled", "unlabelled", "dev", "val", "val_font", "size", "aged")
        corpus_folder()  # one clear error if a package is missing
        drawn_by = ("music21", "verovio", "resvg-py", "numpy", "pillow")
        return (
            {name: getattr(self, name) for name in asked}
            | {"revision": REVISION}
            | {name: version(name) for name in drawn_by}
        )

    @cached_property
    def streams(self) -> Mapping[str, Stream]:
        """The pages of each stream, in an order drawn by the seed."""
        return plan(self)

    @staticmethod
    def render(item: Page) -> EncodedSample:
        """See :func:`render_page`."""
        return render_page(item)


def render_page(page: Page) -> EncodedSample:
    """Engrave, age and encode one page; the same bytes for the same page and versions of the libraries.

    Raises:
        DataError: verovio cannot read the piece.
    """
    rng = np.random.default_rng(_number(page.seed, page.key))
    style = Style(page.font) if page.house_style else _draw_style(page.font, rng)
    try:
        musicxml = cut_measures(read_musicxml(page.corpus / page.piece), page.first, page.first + _MEASURES - 1)
        sheet = engrave(musicxml, style, page.size)
    except DataError as error:
        raise DataError(f"{page.piece}, measure {page.first}: {error}") from None
    overview = (sheet.raster(0, max(sheet.height, page.size), oversampling=1) > 0).astype(np.float32)
    top, verso_top = _draw_windows(overview, page.size, rng)
    if page.aged:
        ink, label = downsample(bend(sheet.raster(top, page.size, MARGIN), page.size, MARGIN, rng))
        verso = overview[verso_top : verso_top + page.size]
        image, extension = encode_jpeg(age(ink, verso, rng), int(rng.integers(45, 91))), "jpg"
    else:
        ink, label = downsample(sheet.raster(top, page.size))
        image, extension = _encode(np.rint(255 * (1 - ink)).astype(np.uint8), "WEBP", lossless=True), "webp"
    return EncodedSample(page.key, image, extension, _encode(label, "PNG", compress_level=9) if page.labelled else None)


def plan(source: ScoresSource) -> dict[str, Stream]:
    """Deal works to streams and pages to works.

    Raises:
        DataError: the corpus has too few pages.
    """
    corpus = corpus_folder()
    decks = {name: _Deck() for name in REPERTORIES}
    by_work: dict[str, list[Piece]] = {}
    for piece in find_pieces(corpus):
        by_work.setdefault(piece.work, []).append(piece)
    for work in sorted(by_work, key=lambda work: _number(source.seed, "work", work)):
        decks[by_work[work][0].repertory].works.append(by_work[work])

    streams = {}
    for stream in ("labelled", "dev", "val", "val_font", "unlabelled"):
        wanted: int = getattr(source, stream)
        places: list[_Place] = []
        for repertory, share in _quota(wanted).items():
            deck = decks[repertory]
            if stream == "labelled":
                places += deck.deal_rich(share, source.seed)
            elif stream == "unlabelled":
                places += deck.deal_all(source.seed)
            else:
                places += deck.deal(share, _HELD_OUT_PAGES_A_WORK, source.seed)
        if stream == "unlabelled":
            places = _take_by_quota(places, wanted)
        if len(places) < wanted:
            raise DataError(f"{stream}={wanted}: the corpus has only {len(places)} pages left for it; ask for fewer")
        places.sort(key=lambda place: _number(source.seed, stream, place.name))
        fonts = {"labelled": FONTS[:1], "val_font": (HELD_OUT_FONT,)}.get(stream, FONTS)
        pages = [
            Page(
                key=f"{stream}-{place.name}-{(font := fonts[number % len(fonts)]).lower()}",
                corpus=corpus,
                piece=place.piece.path,
                work=place.piece.work,
                first=place.first,
                font=font,
                house_style=stream == "labelled",
                labelled=stream != "unlabelled",
                aged=source.aged,
                size=source.size,
                seed=source.seed,
            )
            for number, place in enumerate(places)
        ]
        if pages:
            streams[stream] = Stream(labelled=stream != "unlabelled", items=pages)
    return streams


@dataclass(frozen=True)
class _Place:
    """Where a page begins; `turn` counts the pages that its work has given before."""

    piece: Piece
    first: int
    turn: int

    @property
    def name(self) -> str:
        stem = re.sub(r"[^a-z0-9]+", "-", self.piece.path.rpartition(".")[0].lower()).strip("-")
        kind = self.piece.path.rpartition(".")[2]
        return f"{stem}-{kind}-m{self.first:04d}"


@dataclass
class _Deck:
    """The works of one repertory that no stream has taken yet, in the order of the seed's hash."""

    works: list[list[Piece]] = field(default_factory=list)

    def deal(self, pages: int, pages_a_work: int, seed: int) -> list[_Place]:
        """Take works until they have given `pages`."""
        dealt: list[_Place] = []
        for work in self._single_works():
            if len(dealt) >= pages:
                break
            self.works.remove(work)
            dealt += _places(work, seed)[: min(pages_a_work, pages - len(dealt))]
        return dealt

    def deal_rich(self, pages: int, seed: int) -> list[_Place]:
        """Take the works whose pages show the most kinds of symbols, one page each."""
        candidates = [
            max(_places(work, seed)[:_LABELLED_CHOICE], key=lambda place: _kinds(place.piece, place.first))
            for work in self._single_works()[: _LABELLED_CHOICE * pages]
        ]
        candidates.sort(key=lambda place: -_kinds(place.piece, place.first))  # stable: the hash decides between equals
        taken = candidates[:pages]
        works = {place.piece.work for place in taken}
        self.works = [work for work in self.works if work[0].work not in works]
        return taken

    def deal_all(self, seed: int) -> list[_Place]:
        """Every page of every work that is left."""
        return [place for work in self.works for place in _places(work, seed)]

    def _single_works(self) -> list[list[Piece]]:
        return [work for work in self.works if len(work) <= _ANTHOLOGY]


def _places(work: list[Piece], seed: int) -> list[_Place]:
    """The pages of a work, in the order of the seed's hash."""
    found = [(piece, first) for piece in work for first in range(1, max(2, piece.measures - _MEASURES // 2), _STEP)]
    found.sort(key=lambda place: _number(seed, "place", place[0].path, place[1]))
    return [_Place(piece, first, turn) for turn, (piece, first) in enumerate(found)]


def _kinds(piece: Piece, first: int) -> int:
    # What a window of the sheet shows is about the first third of the measures engraved.
    return len(piece.symbols(first, first + _MEASURES // 3))


def _quota(pages: int) -> dict[str, int]:
    """`pages` in the proportions of `_SHARES`, largest remainders first."""
    exact = {name: pages * share for name, share in _SHARES.items()}
    quota = {name: int(amount) for name, amount in exact.items()}
    for name in sorted(exact, key=lambda name: quota[name] - exact[name])[: pages - sum(quota.values())]:
        quota[name] += 1
    return quota


def _take_by_quota(places: Iterable[_Place], pages: int) -> list[_Place]:
    """`pages` of all places: the quota of each repertory, then whatever is left; first pages of works come first."""
    in_turn = sorted(places, key=lambda place: place.turn)
    left = _quota(pages)
    chosen, spare = [], []
    for place in in_turn:
        if left[place.piece.repertory]:
            left[place.piece.repertory] -= 1
            chosen.append(place)
        else:
            spare.append(place)
    return chosen + spare[: pages - len(chosen)]


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


def _number(*parts: object) -> int:
    """A number of 64 bits that depends on nothing but the parts."""
    return int.from_bytes(hashlib.sha256("\n".join(map(str, parts)).encode()).digest()[:8], "big")


def _encode(grey: NDArray[np.uint8], file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, file_format, **options)
    return buffer.getvalue()
