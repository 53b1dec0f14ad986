"""Classes that are merged, renamed or ignored when label maps are read (`data.remap`).

Decision: docs/decisions/0084-classes-are-remapped-by-the-decoder.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

IGNORE_NAME = "ignore"
"""The target that stands for ignored pixels."""
FEWEST_CLASSES = 2
"""A model that knows one class has nothing to learn."""
_MOST_NAMED = 10


@dataclass(frozen=True)
class Remap:
    """From the classes that are stored to those that a model learns.

    Attributes:
        classes: names by new value.
        palette: a colour for each, 0–255.
        stored: number of classes that are stored.
        table: 256 bytes: the new value by stored one. Stored values that are no class stay what they are.
    """

    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    stored: int
    table: bytes

    @cached_property
    def _values(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.table, np.uint8)

    def map(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """New values of a label map: uint8, of the same shape, in memory of its own."""
        return self._values[label]

    def sums(self, pixels: Sequence[int]) -> tuple[int, ...]:
        """Pixels by new class, and last those that are ignored, of those by stored class and ignored ones."""
        found = [0] * (len(self.classes) + 1)
        for value, count in enumerate(pixels):
            new = self.table[value] if value < self.stored else len(self.classes)
            found[min(new, len(self.classes))] += count
        return tuple(found)


def remap_classes(
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
    ignore_index: int,
    remap: Mapping[str, str],
    *,
    strict: bool = True,
) -> Remap:
    """The classes and values that `data.remap` makes of those of an index.

    New classes keep the order of the index. One that is merged or renamed stands where the first of its members stood,
    and has its colour.

    Args:
        classes: names by stored value.
        palette: a colour for each.
        ignore_index: value of ignored pixels, as it stays.
        remap: from names of ``classes`` to new names, names that stay, or :data:`IGNORE_NAME`.
        strict: whether names that ``classes`` has not are refused, and too few classes that are left. Otherwise such
            names are passed over.

    Raises:
        ValueError: see ``strict``; or a target that is itself remapped to another name (:func:`check_remap`).
    """
    check_remap(remap)
    unknown = [name for name in remap if name not in classes]
    if unknown and strict:
        near = difflib.get_close_matches(unknown[0], classes, 3, 0.5)
        more = ", …" if len(classes) > _MOST_NAMED else ""
        there = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(classes[:_MOST_NAMED])}{more}"
        raise ValueError(f"data.remap: the index has no class {unknown[0]!r}; {there}")
    table = np.arange(256, dtype=np.uint8)
    values: dict[str, int] = {}
    for value, name in enumerate(classes):
        target = remap.get(name, name)
        is_ignored = name in remap and target == IGNORE_NAME
        table[value] = ignore_index if is_ignored else values.setdefault(target, len(values))
    if strict and len(values) < FEWEST_CLASSES:
        left = f"only {next(iter(values))!r}" if values else "no class"
        raise ValueError(f"data.remap leaves {left} of {len(classes)} classes; at least {FEWEST_CLASSES} are needed")
    first = [int(np.flatnonzero(table[: len(classes)] == value)[0]) for value in values.values()]
    return Remap(tuple(values), tuple(palette[number] for number in first), len(classes), table.tobytes())


def check_remap(remap: Mapping[str, str]) -> None:
    """Refuse what no index could make right: names without a letter, and chains, which could be read in two ways.

    Raises:
        ValueError: names both classes.
    """
    for name, target in remap.items():
        if not name.strip() or not target.strip():
            raise ValueError(f"data.remap: {name!r}: {target!r}: a class needs a name")
        further = remap.get(target, target)
        if target not in (name, IGNORE_NAME) and further != target:
            raise ValueError(
                f"data.remap: {name}: {target}, but {target}: {further}: chains are not followed; write {name}: "
                f"{further}, or another name for {target}"
            )
