"""A contact sheet as a picture: a title, a legend of classes, and samples in columns. Knows nothing of shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _MARGIN, _GAP, _PAIR_GAP = 1680, 40, 24, 4
"""Px: of the sheet; around it; between samples; between the pictures of one sample."""
PAPER = "#ffffff"
_INK, _FAINT, _LINE, _ALARM = "#1c2024", "#6b7178", "#d5d9de", "#b3261e"

LegendRow = tuple[Image.Image, str, str]
"""A class: its colour as a small picture, its name, and a note such as its share of the pixels."""


@dataclass(frozen=True)
class Card:
    """One sample on the sheet."""

    key: str
    size: str
    """Height and width in words, or where a bad sample lies."""
    pictures: tuple[Image.Image, ...]
    """The image and, if it has a label map, the image under it; none if the sample is bad."""
    fault: str = ""
    """Why it has no pictures."""


def filling(longest: int, pictures: int) -> int:
    """The longest side, px, nearest to ``longest`` with which samples of so many pictures fill the width."""
    usable = _WIDTH - 2 * _MARGIN + _GAP
    columns = max(1, round(usable / (pictures * longest + (pictures - 1) * _PAIR_GAP + _GAP)))
    return (usable // columns - _GAP - (pictures - 1) * _PAIR_GAP) // pictures


@cache
def load_font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """A font of `size` px."""
    import matplotlib

    # Matplotlib brings a font with Latin, Greek and Cyrillic; Pillow's own has Latin only.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


class ContactSheet:
    """A picture that grows downwards."""

    def __init__(self) -> None:
        self._rows: list[Image.Image] = []

    def _row(self, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        self._rows.append(Image.new("RGB", (_WIDTH, height), PAPER))
        return self._rows[-1], ImageDraw.Draw(self._rows[-1])

    def picture(self) -> Image.Image:
        """All of it."""
        sheet = Image.new("RGB", (_WIDTH, sum(row.height for row in self._rows) + _MARGIN), PAPER)
        top = 0
        for row in self._rows:
            sheet.paste(row, (0, top))
            top += row.height
        return sheet

    def title(self, source: str, root: str) -> None:
        """Name of the source, and where it lies."""
        _, draw = self._row(96)
        source = fitting(source, load_font(34, bold=True), _WIDTH // 2)
        draw.text((_MARGIN, 58), source, _INK, load_font(34, bold=True), anchor="ls")
        after = _MARGIN + draw.textlength(source, load_font(34, bold=True)) + 20
        shown = fitting(root, load_font(18), int(_WIDTH - _MARGIN - after))
        draw.text((after, 58), shown, _FAINT, load_font(18), anchor="ls")

    def legend(self, rows: Sequence[LegendRow]) -> None:
        """Classes in columns."""
        self._rows.append(legend_picture(rows, _WIDTH))

    def section(self, name: str, about: str) -> None:
        """Heading of a stream."""
        _, draw = self._row(88)
        name = fitting(name, load_font(24, bold=True), _WIDTH // 2)
        draw.line((_MARGIN, 26, _WIDTH - _MARGIN, 26), _LINE)
        draw.text((_MARGIN, 66), name, _INK, load_font(24, bold=True), anchor="ls")
        after = _MARGIN + draw.textlength(name, load_font(24, bold=True)) + 16
        draw.text((after, 66), about, _FAINT, load_font(16), anchor="ls")

    def cards(self, cards: Sequence[Card], pictures: int, longest: int) -> None:
        """Samples in a grid whose columns are as wide as the widest sample.

        Args:
            cards: the samples.
            pictures: of each sample.
            longest: side of a picture, px.
        """
        widest = max((image.width for card in cards for image in card.pictures), default=longest)
        cell = max(pictures * widest + (pictures - 1) * _PAIR_GAP, min(longest, 200))
        columns = max(1, (_WIDTH - 2 * _MARGIN + _GAP) // (cell + _GAP))
        for line in _lines(cards, columns):
            tallest = max((image.height for card in line for image in card.pictures), default=longest // 2)
            row, draw = self._row(tallest + 64)
            for number, card in enumerate(line):
                _draw_card(row, draw, card, _MARGIN + number * (cell + _GAP), cell, tallest, widest)


def legend_picture(rows: Sequence[LegendRow], width: int) -> Image.Image:
    """Classes in columns, as a picture.

    Args:
        rows: at least one.
        width: of the picture, px. Names that do not fit it are cut.
    """
    name_font, share_font = load_font(16), load_font(14)
    usable = width - 2 * _MARGIN
    named = [(swatch, fitting(name, name_font, usable - 120), share) for swatch, name, share in rows]
    widest = max(name_font.getlength(name) + share_font.getlength(share) for _, name, share in named)
    columns = max(1, int(usable // (widest + 84)))
    lines = -(-len(rows) // columns)
    columns = -(-len(rows) // lines)
    step = min(usable / columns, widest + 120)
    picture = Image.new("RGB", (width, lines * 30 + 6), PAPER)
    draw = ImageDraw.Draw(picture)
    for number, (swatch, name, share) in enumerate(named):
        left, top = int(_MARGIN + number // lines * step), number % lines * 30
        picture.paste(swatch, (left, top + 4))
        draw.rectangle((left, top + 4, left + swatch.width - 1, top + 3 + swatch.height), outline=_FAINT)
        draw.text((left + 38, top + 19), name, _INK, name_font, anchor="ls")
        draw.text((left + 48 + name_font.getlength(name), top + 19), share, _FAINT, share_font, anchor="ls")
    return picture


def _lines(cards: Sequence[Card], columns: int) -> Iterator[Sequence[Card]]:
    """The cards in rows of `columns`."""
    for start in range(0, len(cards), columns):
        yield cards[start : start + columns]


def _draw_card(
    row: Image.Image, draw: ImageDraw.ImageDraw, card: Card, left: int, cell: int, tallest: int, widest: int
) -> None:
    """Draw a card into a row.

    Args:
        row: the picture.
        draw: on it.
        card: what to draw.
        left: its left edge, px.
        cell: its width, px.
        tallest: height of the tallest picture of the row, px.
        widest: width of the widest picture of the section, px.
    """
    for number, image in enumerate(card.pictures):
        at = left + number * (widest + _PAIR_GAP)
        row.paste(image, (at, 0))
        draw.rectangle((at, 0, at + image.width - 1, image.height - 1), outline=_LINE)
    below = max((image.height for image in card.pictures), default=tallest)
    if card.fault:
        draw.rectangle((left, 0, left + cell - 1, tallest - 1), outline=_ALARM, fill="#fdf3f2")
        for number, line in enumerate(_wrapped(card.fault, load_font(15), cell - 28)[: (tallest - 20) // 21]):
            draw.text((left + 14, 30 + number * 21), line, _ALARM, load_font(15), anchor="ls")
    draw.text((left, below + 20), fitting(card.key, load_font(14), cell), _INK, load_font(14), anchor="ls")
    draw.text((left, below + 38), fitting(card.size, load_font(12), cell), _FAINT, load_font(12), anchor="ls")


def fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text on one line of at most `width` px, its middle left out if it is too long."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    text = text[:200] + text[-200:]
    kept = len(text)
    while kept > 2 and font.getlength(shorter := f"{text[: (kept + 1) // 2]}…{text[-(kept // 2) :]}") > width:
        kept -= 1
    return shorter


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text on lines of at most `width` px."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(fitting(word, font, width))
    return [line for line in lines if line]
