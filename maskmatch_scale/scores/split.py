"""Which pages there are, and in which stream each is: by work, so that no work is on two sides.

What counts as one work: :func:`maskmatch_scale.scores.corpus.find_pieces`. A seeded hash orders the works of each
repertory and deals them to `labelled`, `dev`, `val`, `val_font`; `unlabelled` gets those that remain. A work with more
than `_ANTHOLOGY` files (Bach's passions and the chorales that share their tunes) is always unlabelled. Labelled pages
are those that show the most kinds of symbols among a few that the hash picks: somebody who can label only a few pages
would choose such pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.scores.corpus import REPERTORIES, Piece, corpus_folder, find_pieces
from maskmatch_scale.scores.page import MEASURES, Page, hash_number

UNLABELLED = "unlabelled"
STREAMS = ("labelled", "dev", "val", "val_font", UNLABELLED)
"""In the order in which works are dealt to them."""

FONTS = ("Leipzig", "Bravura", "Leland", "Petaluma")
"""Fonts of the archive; the first is that of the labelled pages."""

HELD_OUT_FONT = "Gootville"
"""The font of `val_font`."""

_SHARES = {"chorale": 0.3, "madrigal": 0.15, "medieval": 0.15, "instrumental": 0.4}
"""Share of a stream's pages from each repertory, as far as it has so many."""

_STEP = 24
"""Measures from the start of one page of a piece to the start of the next."""

_ANTHOLOGY = 8
_HELD_OUT_PAGES_A_WORK = 2
_LABELLED_CHOICE = 3
"""Candidates looked at for each labelled page."""


def deal_pages(counts: Mapping[str, int], *, seed: int, size: int, aged: bool) -> dict[str, list[Page]]:
    """Deal the works of the corpus to streams, and choose their pages.

    Args:
        counts: pages of each of :data:`STREAMS`; a stream of 0 pages is left out.
        seed: of the hash that orders the works.
        size: side of a page, px.
        aged: see :class:`Page`.

    Returns:
        The pages of each stream, in an order drawn by the seed.

    Raises:
        DataError: the corpus has too few pages.
    """
    corpus = corpus_folder()
    decks = {name: _Deck() for name in REPERTORIES}
    by_work: dict[str, list[Piece]] = {}
    for piece in find_pieces(corpus):
        by_work.setdefault(piece.work, []).append(piece)
    for work in sorted(by_work, key=lambda work: hash_number(seed, "work", work)):
        decks[by_work[work][0].repertory].works.append(by_work[work])

    streams = {}
    for stream in STREAMS:
        wanted = counts[stream]
        places: list[_Place] = []
        for repertory, share in _quota(wanted).items():
            deck = decks[repertory]
            if stream == "labelled":
                places += deck.deal_rich(share, seed)
            elif stream == UNLABELLED:
                places += deck.deal_all(seed)
            else:
                places += deck.deal(share, _HELD_OUT_PAGES_A_WORK, seed)
        if stream == UNLABELLED:
            places = _take_by_quota(places, wanted)
        if len(places) < wanted:
            raise DataError(f"{stream}={wanted}: the corpus has only {len(places)} pages left for it; ask for fewer")
        places.sort(key=lambda place: hash_number(seed, stream, place.name))
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
                labelled=stream != UNLABELLED,
                aged=aged,
                size=size,
                seed=seed,
            )
            for number, place in enumerate(places)
        ]
        if pages:
            streams[stream] = pages
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
    found = [(piece, first) for piece in work for first in range(1, max(2, piece.measures - MEASURES // 2), _STEP)]
    found.sort(key=lambda place: hash_number(seed, "place", place[0].path, place[1]))
    return [_Place(piece, first, turn) for turn, (piece, first) in enumerate(found)]


def _kinds(piece: Piece, first: int) -> int:
    # What a window of the sheet shows is about the first third of the measures engraved.
    return len(piece.symbols(first, first + MEASURES // 3))


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
