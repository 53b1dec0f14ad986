"""A look at a shard folder: some samples of each stream on one sheet, label maps in the colours of the index."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.images.bands import shown_channels
from maskmatch_scale.data.images.decode import decode_image, decode_label
from maskmatch_scale.data.shards.folder import ShardOpener, load_index
from maskmatch_scale.data.shards.index import ShardIndex, StreamEntry
from maskmatch_scale.data.shards.tar import read_table
from maskmatch_scale.data.tools.overlay import legend, overlaid, thumbnail
from maskmatch_scale.data.tools.shard_check import OpenShard
from maskmatch_scale.data.tools.sheet import Card, ContactSheet, filling
from maskmatch_scale.files import write_whole
from maskmatch_scale.redact import shown
from maskmatch_scale.seeds import generator


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
    """Write a PNG of samples: image, then label map in colours over the image in grey; keys below, classes on top.

    Of images with bands, those called red, green and blue are shown, or else the first three, or one as grey.

    A sample that cannot be used gets a card that says why. Pixels of ``ignore_index`` are striped; a percentage beside
    a class is its share of the labelled pixels that are shown.

    Args:
        root: the shard folder.
        out: the PNG to write; its folder is made.
        stream: the only stream to show; None shows all.
        count: samples of each stream.
        seed: of the draw of samples.
        thumbnail_px: longest side of a picture, about: columns fill the sheet.
        index: of the folder; None reads ``root/index.json``.
        open_shard: how to open a shard; None opens ``root/file``.

    Returns:
        ``out``.

    Raises:
        DataError: no index, or no such stream.
    """
    index = index or load_index(str(root), key="", parts=True)
    open_shard = open_shard or ShardOpener(str(root))
    names = [stream] if stream is not None else list(index.streams)
    pixels = np.zeros(256, np.int64)
    sections = []
    for name in names:
        entry = index.stream(name)
        numbers = _drawn(entry.samples, count, seed, name)
        longest = filling(thumbnail_px, 1 + entry.labelled)
        cards = [_card(index, entry, number, open_shard, longest, pixels) for number in numbers]
        kind = "with label maps" if entry.labelled else "without labels"
        shards = f"{len(entry.shards):,} shard{'s' * (len(entry.shards) != 1)}"
        about = f"{len(cards)} of {entry.samples:,} samples, {kind}, in {shards}"
        sections.append((name, about, cards, 1 + entry.labelled, longest))
    labelled = any(index.stream(name).labelled for name in names)
    sheet = ContactSheet()
    sheet.title(index.source, shown(str(root)))
    if labelled:
        sheet.legend(legend(index, pixels))
    for name, about, cards, pictures, longest in sections:
        sheet.section(name, about)
        sheet.cards(cards, pictures, longest)
    out.parent.mkdir(parents=True, exist_ok=True)
    packed = io.BytesIO()
    sheet.picture().save(packed, "PNG")
    write_whole(out, packed.getvalue())
    return out


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
) -> Card:
    """Sample ``number`` of a stream; its label's pixels are added to ``pixels``, by value."""
    shard, place = entry.shards.locate(number)
    file_name, key = entry.shards.file(shard), f"sample {place}"
    try:
        with open_shard(file_name) as file:
            table = read_table(file, file_name, labelled=entry.labelled)
            if place >= len(table):
                raise DataError(f"{file_name}: {len(table)} samples where the index says {entry.shards.samples[shard]}")
            key = table.key(place)
            encoded, encoded_label = table.read(file, place)
        name = f"{file_name}: sample {key!r}"
        image = decode_image(encoded, name, channels=shown_channels(index.bands)).permute(1, 2, 0).numpy()
        size = (image.shape[0], image.shape[1])
        pictures = [thumbnail(Image.fromarray(image), longest)]
        if encoded_label is not None:
            label = decode_label(
                encoded_label, name, num_classes=len(index.classes), ignore_index=index.ignore_index, size=size
            ).numpy()
            pixels += np.bincount(label.ravel(), minlength=256)
            pictures.append(overlaid(image, label, index.palette, index.ignore_index, longest))
    except (DataError, OSError) as error:
        return Card(key, file_name, (), str(error).removeprefix(f"{file_name}: sample {key!r}: "))
    return Card(key, f"{size[1]} × {size[0]} px", tuple(pictures))
