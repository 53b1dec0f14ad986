"""A look at a shard folder: some samples of each stream on one sheet, label maps in the colours of the index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.decode import decode_image, decode_label
from maskmatch_scale.data.shards.index import ShardIndex, StreamEntry
from maskmatch_scale.data.shards.reading import ShardOpener, load_index
from maskmatch_scale.data.shards.tar import read_table
from maskmatch_scale.data.tools.verify import OpenShard
from maskmatch_scale.seeds import generator

_WIDTH, _MARGIN, _GAP, _PAIR_GAP = 1680, 40, 24, 4
_PAPER, _INK, _FAINT, _LINE, _ALARM = "#ffffff", "#1c2024", "#6b7178", "#d5d9de", "#b3261e"
_IGNORED, _IGNORED_STRIPE = (205, 205, 205), (120, 120, 120)
_STRIPE_PX = 6
_STRENGTH = 0.75
"""Share of a class's colour in the overlay; the rest is the image in grey."""
_MOST_LEGEND = 60


@dataclass(frozen=True)
class _Card:
    """One sample on the sheet."""

    key: str
    size: str
    pictures: tuple[Image.Image, ...]
    """The image and, if it has a label map, the image under it; none if the sample is bad."""
    fault: str = ""


def contact_sheet(
    root: str | Path,
    out: Path,
    *,
    stream: str | None = None,
    count: int = 24,
    seed: int = 0,
    thumbnail_px: int = 256,
    index: ShardIndex | None = None,
    open_shard: OpenShard | None = None,
) -> Path:
    """Write a PNG of samples: the image, beside it its label map over it in grey, the key below, classes on top.

    A sample that cannot be used gets a card that says why. Pixels of ``ignore_index`` are striped; a percentage beside
    a class is its share of the labelled pixels that are shown.

    Args:
        root: the shard folder.
        out: the PNG to write; its folder is made.
        stream: the only stream to show; None shows all.
        count: samples of each stream.
        seed: draws them.
        thumbnail_px: longest side of a picture, about: columns fill the sheet.
        index: of the folder; None reads ``root/index.json``.
        open_shard: how to open a shard; None opens ``root/file``.

    Returns:
        ``out``.

    Raises:
        DataError: no index, or no such stream.
    """
    index = index or load_index(str(root))
    open_shard = open_shard or ShardOpener(str(root))
    names = [stream] if stream is not None else list(index.streams)
    pixels = np.zeros(256, np.int64)
    sections = []
    for name in names:
        entry = index.stream(name)
        numbers = _drawn(entry.samples, count, seed, name)
        longest = _filling(thumbnail_px, 1 + entry.labelled)
        cards = [_card(index, entry, number, open_shard, longest, pixels) for number in numbers]
        kind = "with label maps" if entry.labelled else "without labels"
        shards = f"{len(entry.shards):,} shard{'s' * (len(entry.shards) != 1)}"
        about = f"{len(cards)} of {entry.samples:,} samples, {kind}, in {shards}"
        sections.append((name, about, cards, 1 + entry.labelled, longest))
    labelled = any(index.stream(name).labelled for name in names)
    sheet = _Sheet()
    sheet.title(index.source, str(root))
    if labelled:
        sheet.legend(_legend(index, pixels))
    for name, about, cards, pictures, longest in sections:
        sheet.section(name, about)
        sheet.cards(cards, pictures, longest)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.picture().save(out, "PNG")
    return out


def _filling(longest: int, pictures: int) -> int:
    """The side nearest to ``longest`` with which cards of so many pictures fill the width."""
    usable = _WIDTH - 2 * _MARGIN + _GAP
    columns = max(1, round(usable / (pictures * longest + (pictures - 1) * _PAIR_GAP + _GAP)))
    return (usable // columns - _GAP - (pictures - 1) * _PAIR_GAP) // pictures


def _drawn(samples: int, count: int, seed: int, name: str) -> list[int]:
    """``count`` different numbers below ``samples``, ascending."""
    if samples <= count:
        return list(range(samples))
    source = generator(seed, "contact sheet", name)
    drawn: set[int] = set()
    while len(drawn) < count:
        drawn.add(int(torch.randint(samples, (), generator=source)))
    return sorted(drawn)


def _card(
    index: ShardIndex, entry: StreamEntry, number: int, open_shard: OpenShard, longest: int, pixels: NDArray[np.int64]
) -> _Card:
    """Sample ``number`` of a stream; its label's pixels are added to ``pixels``, by value."""
    shard = int(entry.shards.starts.searchsorted(number, side="right")) - 1
    place = number - int(entry.shards.starts[shard])
    file_name, key = entry.shards.file(shard), f"sample {place}"
    try:
        with open_shard(file_name) as file:
            table = read_table(file, file_name, labelled=entry.labelled)
            if place >= len(table):
                raise DataError(f"{file_name}: {len(table)} samples where the index says {entry.shards.samples[shard]}")
            key = table.key(place)
            encoded, encoded_label = table.read(file, place)
        name = f"{file_name}: sample {key!r}"
        image = decode_image(encoded, name).permute(1, 2, 0).numpy()
        size = (image.shape[0], image.shape[1])
        pictures = [_thumbnail(Image.fromarray(image), longest)]
        if encoded_label is not None:
            label = decode_label(
                encoded_label, name, num_classes=len(index.classes), ignore_index=index.ignore_index, size=size
            ).numpy()
            pixels += np.bincount(label.ravel(), minlength=256)
            pictures.append(_overlaid(image, label, index, longest))
    except (DataError, OSError) as error:
        return _Card(key, file_name, (), str(error).removeprefix(f"{file_name}: sample {key!r}: "))
    return _Card(key, f"{size[1]} × {size[0]} px", tuple(pictures))


def _thumbnail(image: Image.Image, longest: int) -> Image.Image:
    """Shrunk to fit; small images grow by a whole factor, pixels visible."""
    factor = longest / max(image.size)
    if factor >= 1:
        grown = int(factor)
        return image.resize((image.width * grown, image.height * grown), Image.Resampling.NEAREST)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)


def _overlaid(image: NDArray[np.uint8], label: NDArray[np.uint8], index: ShardIndex, longest: int) -> Image.Image:
    colours = np.full((256, 3), _IGNORED, np.float32)
    colours[: len(index.palette)] = index.palette
    grey = image.mean(axis=2, dtype=np.float32)[..., None]
    share = np.where(label == index.ignore_index, 1, np.float32(_STRENGTH))[..., None]
    over = share * colours[label] + (1 - share) * grey
    picture = np.array(_thumbnail(Image.fromarray(over.astype(np.uint8)), longest))
    ignored = np.array(_thumbnail(Image.fromarray((label == index.ignore_index).astype(np.uint8) * 255), longest)) > 127
    picture[ignored & _stripes(*ignored.shape)] = _IGNORED_STRIPE
    return Image.fromarray(picture)


def _stripes(height: int, width: int) -> NDArray[np.bool_]:
    down, right = np.ogrid[:height, :width]
    return np.asarray((down + right) % _STRIPE_PX < 2)


def _legend(index: ShardIndex, pixels: NDArray[np.int64]) -> list[tuple[Image.Image, str, str]]:
    """(swatch, class name, share of the pixels)."""
    counted = max(1, int(pixels[: len(index.classes)].sum()))
    rows = [
        (Image.new("RGB", (26, 18), colour), f"{value} {name}", _percent(int(pixels[value]) / counted))
        for value, (name, colour) in enumerate(zip(index.classes, index.palette, strict=True))
    ][:_MOST_LEGEND]
    if len(index.classes) > _MOST_LEGEND:
        rows.append((Image.new("RGB", (26, 18), _PAPER), f"… {len(index.classes) - _MOST_LEGEND} more", ""))
    if pixels[index.ignore_index]:
        swatch = np.full((18, 26, 3), _IGNORED, np.uint8)
        swatch[_stripes(18, 26)] = _IGNORED_STRIPE
        share = int(pixels[index.ignore_index]) / int(pixels.sum())
        rows.append((Image.fromarray(swatch), f"{index.ignore_index} ignored", f"{_percent(share)} of all"))
    return rows


def _percent(share: float) -> str:
    if share == 0:
        return "not shown"
    return f"{share:.0%}" if share >= 0.0995 else f"{share:.1%}" if share >= 0.0005 else "< 0.1%"


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib

    # Matplotlib brings a font with Latin, Greek and Cyrillic; Pillow's own has Latin only.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


class _Sheet:
    """A picture that grows downwards."""

    def __init__(self) -> None:
        self._rows: list[Image.Image] = []

    def _row(self, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
        self._rows.append(Image.new("RGB", (_WIDTH, height), _PAPER))
        return self._rows[-1], ImageDraw.Draw(self._rows[-1])

    def picture(self) -> Image.Image:
        """All of it."""
        sheet = Image.new("RGB", (_WIDTH, sum(row.height for row in self._rows) + _MARGIN), _PAPER)
        top = 0
        for row in self._rows:
            sheet.paste(row, (0, top))
            top += row.height
        return sheet

    def title(self, source: str, root: str) -> None:
        """Name of the source, and where it lies."""
        _, draw = self._row(96)
        draw.text((_MARGIN, 58), source, _INK, _font(34, bold=True), anchor="ls")
        after = _MARGIN + draw.textlength(source, _font(34, bold=True)) + 20
        draw.text((after, 58), _fitting(root, _font(18), int(_WIDTH - _MARGIN - after)), _FAINT, _font(18), anchor="ls")

    def legend(self, rows: Sequence[tuple[Image.Image, str, str]]) -> None:
        """Classes in columns."""
        name_font, share_font = _font(16), _font(14)
        widest = max(name_font.getlength(name) + share_font.getlength(share) for _, name, share in rows)
        columns = max(1, int((_WIDTH - 2 * _MARGIN) // (widest + 84)))
        lines = -(-len(rows) // columns)
        columns = -(-len(rows) // lines)
        step = min((_WIDTH - 2 * _MARGIN) / columns, widest + 120)
        picture, draw = self._row(lines * 30 + 6)
        for number, (swatch, name, share) in enumerate(rows):
            left, top = int(_MARGIN + number // lines * step), number % lines * 30
            picture.paste(swatch, (left, top + 4))
            draw.rectangle((left, top + 4, left + swatch.width - 1, top + 3 + swatch.height), outline=_FAINT)
            draw.text((left + 38, top + 19), name, _INK, name_font, anchor="ls")
            draw.text((left + 48 + name_font.getlength(name), top + 19), share, _FAINT, share_font, anchor="ls")

    def section(self, name: str, about: str) -> None:
        """Heading of a stream."""
        _, draw = self._row(88)
        draw.line((_MARGIN, 26, _WIDTH - _MARGIN, 26), _LINE)
        draw.text((_MARGIN, 66), name, _INK, _font(24, bold=True), anchor="ls")
        after = _MARGIN + draw.textlength(name, _font(24, bold=True)) + 16
        draw.text((after, 66), about, _FAINT, _font(16), anchor="ls")

    def cards(self, cards: Sequence[_Card], pictures: int, longest: int) -> None:
        """Samples in a grid of columns as wide as the widest."""
        widest = max((image.width for card in cards for image in card.pictures), default=longest)
        cell = max(pictures * widest + (pictures - 1) * _PAIR_GAP, min(longest, 200))
        columns = max(1, (_WIDTH - 2 * _MARGIN + _GAP) // (cell + _GAP))
        for line in _lines(cards, columns):
            tallest = max((image.height for card in line for image in card.pictures), default=longest // 2)
            row, draw = self._row(tallest + 64)
            for number, card in enumerate(line):
                _draw_card(row, draw, card, _MARGIN + number * (cell + _GAP), cell, tallest, widest)


def _lines(cards: Sequence[_Card], columns: int) -> Iterator[Sequence[_Card]]:
    for start in range(0, len(cards), columns):
        yield cards[start : start + columns]


def _draw_card(
    row: Image.Image, draw: ImageDraw.ImageDraw, card: _Card, left: int, cell: int, tallest: int, widest: int
) -> None:
    for number, image in enumerate(card.pictures):
        at = left + number * (widest + _PAIR_GAP)
        row.paste(image, (at, 0))
        draw.rectangle((at, 0, at + image.width - 1, image.height - 1), outline=_LINE)
    below = max((image.height for image in card.pictures), default=tallest)
    if card.fault:
        draw.rectangle((left, 0, left + cell - 1, tallest - 1), outline=_ALARM, fill="#fdf3f2")
        for number, line in enumerate(_wrapped(card.fault, _font(15), cell - 28)[: (tallest - 20) // 21]):
            draw.text((left + 14, 30 + number * 21), line, _ALARM, _font(15), anchor="ls")
    draw.text((left, below + 20), _fitting(card.key, _font(14), cell), _INK, _font(14), anchor="ls")
    draw.text((left, below + 38), _fitting(card.size, _font(12), cell), _FAINT, _font(12), anchor="ls")


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text on one line, its middle left out if it is too long."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    text = text[:200] + text[-200:]
    kept = len(text)
    while kept > 2 and font.getlength(shorter := f"{text[: (kept + 1) // 2]}…{text[-(kept // 2) :]}") > width:
        kept -= 1
    return shorter


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(_fitting(word, font, width))
    return [line for line in lines if line]
