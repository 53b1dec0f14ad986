"""From a label map of a data set to class values.

Grey and palette images hold numbers, RGB images hold colours; both go through a table to class values. Whatever the
table does not name is an error. If a value were dropped silently, its class would never be learned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskmatch_scale.data.faults import BadSample
from maskmatch_scale.data.images.label import decode_raw_values, is_8_bit_grey_png
from maskmatch_scale.data.writing.sources.classes import IGNORE, RGB

_UNKNOWN = -1
"""In a table of class values: a label value that has no class and is not ignored."""


@dataclass(frozen=True)
class LabelRule:
    """Maps label maps; picklable.

    Args:
        classes: number of classes.
        id_map: class value, or `IGNORE`, by label value; None: values are class values, and 255 is ignored.
        colours: class value, or `IGNORE`, by colour of an RGB label map; None: such maps are refused.
        unknown_as_ignore: ignore what the table does not name, instead of raising.
        is_found: whether the id map was not given, but found from the label maps.
    """

    classes: int
    id_map: Mapping[int, int] | None = None
    colours: Mapping[RGB, int] | None = None
    unknown_as_ignore: bool = False
    is_found: bool = False

    def read(self, data: bytes, name: str) -> NDArray[np.uint8]:
        """Decode a label map and map its values.

        Args:
            data: the bytes of the file.
            name: of the file, for the message.

        Returns:
            uint8 (H, W), class values and `IGNORE`.

        Raises:
            BadSample: `not_a_label` or `label_value`; names the file, the value and a pixel that has it.
        """
        return self.values(decode_raw_values(data, name), name)

    def values(
        self, pixels: NDArray[Any], name: str, window: tuple[slice, slice] = (slice(0, None), slice(0, None))
    ) -> NDArray[np.uint8]:
        """Map the values of a label map, or of a part of it.

        Args:
            pixels: as :func:`decode_raw_values` returns them.
            name: of the file, for the message.
            window: rows and columns that they are of.

        Returns:
            uint8 (h, w), class values and `IGNORE`.

        Raises:
            BadSample: as :meth:`read`.
        """
        corner = window[0].start, window[1].start
        if pixels.ndim == 3:
            return self._from_colours(pixels, name, corner)
        mapped = self._table[pixels]
        if (mapped == _UNKNOWN).any():
            if not self.unknown_as_ignore:
                first = tuple(np.argwhere(mapped == _UNKNOWN)[0])
                value, (y, x) = pixels[first], np.add(first, corner).tolist()
                raise BadSample("label_value", f"{name}: value {value} at x={x}, y={y} {self._why_unknown}")
            mapped = np.where(mapped == _UNKNOWN, IGNORE, mapped)
        values: NDArray[np.uint8] = mapped.astype(np.uint8)
        return values

    def keeps(self, data: bytes) -> bool:
        """Whether a label map can be stored as it is: an 8-bit grey PNG whose values stay what they are."""
        return self.id_map is None and is_8_bit_grey_png(data)

    def as_json(self) -> object:
        """What the written label maps depend on, for the settings."""
        colours = self.colours and sorted([*colour, value] for colour, value in self.colours.items())
        return [self.classes, self.id_map and sorted(self.id_map.items()), colours]

    @cached_property
    def _table(self) -> NDArray[np.int16]:
        """int16 (65536,): the class value, `IGNORE` or `_UNKNOWN` by label value."""
        table = np.full(1 << 16, _UNKNOWN, np.int16)
        if self.id_map is None:
            table[: self.classes] = np.arange(self.classes)
            table[IGNORE] = IGNORE
        else:
            for value, number in self.id_map.items():
                table[value] = number
        return table

    @property
    def _why_unknown(self) -> str:
        if self.id_map is None:
            last = self.classes - 1
            return f"is no class (0 to {last}) and not {IGNORE}; --id-map or --unknown-as-ignore says what it is"
        if self.is_found:
            values = " nor ".join(map(str, self.id_map))
            return f"is neither {values}, as in other label maps; --id-map or --unknown-as-ignore says what it is"
        return "is not in the id map; add it there, or give --unknown-as-ignore"

    def _from_colours(self, pixels: NDArray[np.uint8], name: str, corner: tuple[int, int]) -> NDArray[np.uint8]:
        if self.colours is None:
            raise BadSample(
                "not_a_label", f"{name}: an RGB label map; --classes with a colour a class says what it means"
            )
        packed = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
        found, place = np.unique(packed, return_inverse=True)
        values = np.full(len(found), IGNORE, np.uint8)
        for number, colour in enumerate(found.tolist()):
            rgb = (colour >> 16, colour >> 8 & 255, colour & 255)
            if rgb in self.colours:
                values[number] = self.colours[rgb]
            elif not self.unknown_as_ignore:
                y, x = np.add(np.argwhere(packed == colour)[0], corner).tolist()
                raise BadSample(
                    "label_value",
                    f"{name}: colour {rgb} at x={x}, y={y} is that of no class; add it to --classes (as `ignore` "
                    "if it counts for nothing), or give --unknown-as-ignore",
                )
        return values[place].reshape(packed.shape)
