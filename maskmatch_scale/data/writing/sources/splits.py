"""Which samples are labelled, unlabelled and held out: split files in UniMatch's format, and seeded shares.

The format is that of https://github.com/LiheYoung/UniMatch (`splits/pascal/1_16/labeled.txt`, which `dataset/semi.py`
reads) and of UniMatch-V2 (ADE20K, and `None` for a label that is not there): a line a sample, the image and its label
map, relative to the root of the data set, with one space between. The second column of an unlabelled file is not used::

    JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.writing.sources.options import Options


class Pair(NamedTuple):
    """Files of one sample, relative to the root of the data set, with forward slashes.

    Where labels are annotations, `label` is these themselves: `sources/annotations.py`.
    """

    image: str
    label: str | None = None


def read_split(path: Path) -> list[Pair]:
    """The lines of a split file; a sample that it names twice counts once.

    Raises:
        DataError: no such file, or a line that is not one or two paths below the root; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{path}: this list of samples cannot be read ({why})") from None
    pairs: dict[str, Pair] = {}
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        paths = [PurePosixPath(field) for field in fields]
        if len(fields) > 2 or any(part.is_absolute() or ".." in part.parts for part in paths):
            raise DataError(
                f"{path}:{number}: {line.strip()!r} is not `image label`, two paths below the root without spaces"
            )
        label = None if len(fields) < 2 or fields[1] == "None" else str(paths[1])
        pairs.setdefault(str(paths[0]), Pair(str(paths[0]), label))
    if not pairs:
        raise DataError(f"{path}: no line in it; the format is `image label` a line, relative to the data set's root")
    return list(pairs.values())


def split_train(
    labelled: Path | None,
    unlabelled: Path | None,
    train: Callable[[], Sequence[Pair]],
    find: Callable[[Pair], Pair],
) -> tuple[list[Pair], list[Pair]]:
    """The labelled and the unlabelled samples that split files ask for.

    Args:
        labelled: split file; None: the samples of `train` that have label maps and are not in the other file.
        unlabelled: split file; None: the samples of `train` that are not in the other file. Without both files, the
            samples of `train` that have label maps are labelled, and the others unlabelled.
        train: the data set's own training samples.
        find: from a line of a split file to the sample of this data set.

    Raises:
        DataError: a split file cannot be read, or a labelled line has no label map.
    """
    if labelled is None and unlabelled is None:
        own = train()
        return [pair for pair in own if pair.label], [Pair(pair.image) for pair in own if not pair.label]
    with_labels = None if labelled is None else [find(pair) for pair in read_split(labelled)]
    without = None if unlabelled is None else [Pair(find(pair).image) for pair in read_split(unlabelled)]
    if with_labels is None or without is None:
        taken = {pair.image for pair in with_labels or without or ()}
        rest = [pair for pair in train() if pair.image not in taken]
        if with_labels is None:
            with_labels = [pair for pair in rest if pair.label]
        else:
            without = [Pair(pair.image) for pair in rest]
    for pair in with_labels:
        if pair.label is None:
            raise DataError(f"{labelled}: {pair.image} has no label map, but the split calls it labelled")
    return with_labels, without or []


def hold_out(pairs: Sequence[Pair], amount: str | None, seed: int, option: str) -> tuple[list[Pair], list[Pair]]:
    """Take samples away by a seeded hash of their images' paths.

    Those with the lowest hashes are held out, so that a sample which is added moves few others.

    Args:
        pairs: to take from.
        amount: a count (`200`) or a share with a point (`0.1`); None takes nothing.
        seed: of the hash.
        option: its name, for the message; different options hold out different samples.

    Returns:
        What remains and what is held out, each in the order of `pairs`.

    Raises:
        DataError: `amount` is not a count or share, is a share of less than one sample, or leaves no sample.
    """
    if amount is None:
        return list(pairs), []
    count = _count(amount, len(pairs), option)
    in_order = sorted(range(len(pairs)), key=lambda number: sort_key(seed, option, pairs[number].image))
    held = frozenset(in_order[:count])
    rest = [pair for number, pair in enumerate(pairs) if number not in held]
    return rest, [pair for number, pair in enumerate(pairs) if number in held]


def _count(amount: str, there: int, option: str) -> int:
    """How many of so many labelled samples an amount is."""
    try:
        share = float(amount) if "." in amount else math.nan
        count = round(share * there) if 0 < share < 1 else int(amount)
        if count < 0:
            raise ValueError(amount)
    except ValueError:
        percent = re.fullmatch(r"(\d{1,2}(\.\d+)?) ?%", amount)
        instead = f", which is {option} {float(percent[1]) / 100:g} here" if percent else ""
        raise DataError(f"{option} {amount}: it must be a count (200) or a share below 1 (0.1){instead}") from None
    if not there and (count or share > 0):
        raise DataError(
            f"{option} {amount}: no sample has a label map, and those that are held out need one; --help says where "
            f"label maps are looked for. Or leave {option} out"
        )
    if count >= max(1, there):
        raise DataError(
            f"{option} {amount}: there are {there} labelled samples, and some must be left to learn from; the most is "
            f"{option} {there - 1}"
            if there > 1
            else f"{option} {amount}: there is one labelled sample, which is needed to learn from; leave {option} out"
        )
    if count == 0 and share > 0:
        raise DataError(f"{option} {amount}: less than one of {there} labelled samples; give a count: {option} 1")
    return count


def hold_out_dev(listing: dict[str, list[Pair]], options: Options) -> dict[str, list[Pair]]:
    """The listing with `dev` samples taken out of `labelled`, if they are asked for."""
    rest, held = hold_out(listing["labelled"], options.dev, options.split_seed, "--dev")
    return listing | {"labelled": rest, "dev": held}


def sort_key(seed: int, what: str, path: str) -> bytes:
    """A hash of eight bytes to sort paths by: every seed and every purpose `what` gives an order of its own."""
    return hashlib.blake2b(f"{seed} {what} {path}".encode("utf-8", "surrogateescape"), digest_size=8).digest()


def listing_digest(streams: Iterable[tuple[str, Sequence[Pair]]]) -> str:
    """How many samples there are, and a hash of their paths and streams: other files are another data set."""
    digest = hashlib.sha256()
    count = 0
    for name, pairs in streams:
        digest.update(f"{name}\0".encode())
        for pair in pairs:
            digest.update(f"{pair.image}\0{pair.label or ''}\n".encode("utf-8", "surrogateescape"))
        count += len(pairs)
    return f"{count} samples, {digest.hexdigest()[:16]}"
