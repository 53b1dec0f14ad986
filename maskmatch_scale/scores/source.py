"""The data source of the quickstart: pages of real scores with pixel-exact labels.

The task is optical music recognition, that of DeepScores. This is a data source like any other
(:class:`maskmatch_scale.data.writing.DataSource`): it is outside `data/`, and nothing in `data/` knows of it.

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

Split: by work, not by page (`split.py`).

Ageing (`ageing.py`): rotation to ±1.5° and a slow warp, image and label alike; bled and worn ink by a locally varying
threshold, specks, paper tone and grain, bleed-through of the verso, uneven light, blur, noise, JPEG of quality 45–90.

Licences: verovio LGPL-3, music21 BSD, resvg-py MIT, the music fonts SIL OFL. The pieces are mostly in the public
domain; their encodings carry notices of their own and some forbid commercial use (music21's `corpus/license.txt`). So
pages are rendered at set-up and are not to be committed or passed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version

from maskmatch_scale.data.writing import EncodedSample, StreamItems
from maskmatch_scale.scores.corpus import corpus_folder
from maskmatch_scale.scores.engraving import CLASSES
from maskmatch_scale.scores.page import Page, render_page
from maskmatch_scale.scores.split import STREAMS, UNLABELLED, deal_pages

REVISION = 3
"""Raise it with every change of this source that changes pages: folders of older pages are then refused."""

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


@dataclass(frozen=True)
class ScoresSource:
    """Streams of score pages, for :func:`maskmatch_scale.data.writing.write_shards`.

    Args:
        seed: of the split, of engraving styles and of the ageing.
        labelled, unlabelled, dev, val, val_font: pages in each stream; 0 leaves a stream out.
        size: side of a page, px.
        aged: whether pages are made to look like scans; otherwise they are as drawn.

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
    def streams(self) -> Mapping[str, StreamItems]:
        """The pages of each stream, in an order drawn by the seed."""
        counts = {name: getattr(self, name) for name in STREAMS}
        dealt = deal_pages(counts, seed=self.seed, size=self.size, aged=self.aged)
        return {name: StreamItems(labelled=name != UNLABELLED, items=pages) for name, pages in dealt.items()}

    @staticmethod
    def render(item: Page) -> EncodedSample:
        """See :func:`render_page`."""
        return render_page(item)
