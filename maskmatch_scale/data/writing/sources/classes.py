"""Label maps as data sets have them, and the class values they become.

Grey and palette images hold values, RGB images hold colours; both go through a table to class values. Whatever the
table does not name is an error, for a value that is silently dropped is a class that is silently never learned.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from maskmatch_scale.data.faults import BadSample, DataError

IGNORE = 255
"""Label value, in what is written, of pixels that count for nothing."""

BUILT_IN = ("voc", "cityscapes", "ade20k", "coco_stuff", "coco")
"""Tables of classes that come with the package: `NAME.json` beside this file, which says whose table it follows."""

RGB = tuple[int, int, int]

_FORMATS = ("PNG", "TIFF", "BMP", "GIF")
_COLOUR = re.compile(r"(.*?)[\s,;]+(\d+)[\s,;]+(\d+)[\s,;]+(\d+)")
_GREY_STEPS = {1: 255, 2: 85, 4: 17}
"""By bits of a grey PNG: what Pillow multiplies its values by."""


@dataclass(frozen=True)
class Classes:
    """Names and colours of classes.

    Attributes:
        names: by class value.
        palette: one colour a class.
        ignored: label values of a data set's own files that count for nothing.
        values: label values of a data set's own files, by class; None: they are the class values.
        colours: class value by colour of RGB label maps, `IGNORE` for those that count for nothing; None: not given.
    """

    names: tuple[str, ...]
    palette: tuple[RGB, ...]
    ignored: tuple[int, ...] = ()
    values: tuple[tuple[int, ...], ...] | None = None
    colours: Mapping[RGB, int] | None = None

    @property
    def id_map(self) -> dict[int, int]:
        """Class value by label value of the data set's own files."""
        assert self.values is not None
        ids = {value: number for number, values in enumerate(self.values) for value in values}
        return ids | dict.fromkeys(self.ignored, IGNORE)


@dataclass(frozen=True)
class LabelRule:
    """From the bytes of a label map to class values.

    Args:
        classes: number of classes.
        id_map: class value, or `IGNORE`, by label value; None: values are class values, and 255 is ignored.
        colours: likewise by colour of an RGB label map; None: such maps are refused.
        unknown_as_ignore: ignore what the table does not name, instead of raising.
    """

    classes: int
    id_map: Mapping[int, int] | None = None
    colours: Mapping[RGB, int] | None = None
    unknown_as_ignore: bool = False

    def read(self, data: bytes, name: str) -> NDArray[np.uint8]:
        """Decode a label map and map it.

        Returns:
            uint8 (H, W), class values and `IGNORE`.

        Raises:
            BadSample: `not_a_label` or `label_value`; names the file, the value and a pixel that has it.
        """
        pixels = _decode(data, name)
        if pixels.ndim == 3:
            return self._from_colours(pixels, name)
        mapped = self._table[pixels]
        if (mapped == _UNKNOWN).any():
            if not self.unknown_as_ignore:
                y, x = np.argwhere(mapped == _UNKNOWN)[0].tolist()
                raise BadSample("label_value", f"{name}: value {pixels[y, x]} at x={x}, y={y} {self._why_unknown}")
            mapped = np.where(mapped == _UNKNOWN, IGNORE, mapped)
        values: NDArray[np.uint8] = mapped.astype(np.uint8)
        return values

    def keeps(self, data: bytes) -> bool:
        """Whether a label map can be stored as it is: an 8-bit grey PNG whose values stay what they are."""
        return self.id_map is None and data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:26] == b"\x08\x00"

    def as_json(self) -> object:
        """What label maps are made with, for the settings."""
        colours = self.colours and sorted([*colour, value] for colour, value in self.colours.items())
        return [self.classes, self.id_map and sorted(self.id_map.items()), colours]

    @cached_property
    def _table(self) -> NDArray[np.int16]:
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
        return "is not in the id map; add it there, or give --unknown-as-ignore"

    def _from_colours(self, pixels: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
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
                y, x = np.argwhere(packed == colour)[0].tolist()
                raise BadSample(
                    "label_value",
                    f"{name}: colour {rgb} at x={x}, y={y} is that of no class; add it to --classes (as `ignore` "
                    "if it counts for nothing), or give --unknown-as-ignore",
                )
        return values[place].reshape(packed.shape)


_UNKNOWN = -1


def _decode(data: bytes, name: str) -> NDArray[Any]:
    """Integers (H, W), or uint8 (H, W, 3) of an RGB image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in _FORMATS:
                raise BadSample("not_a_label", f"{name}: a label map has to be a PNG, not a {image.format} (lossy?)")
            if image.mode in ("RGB", "RGBA"):
                return np.asarray(image.convert("RGB"))
            if image.mode not in ("1", "L", "P", "I;16", "I;16B"):
                what = f"label map of mode {image.mode}; grey (8 or 16 bits), palette or RGB is needed"
                raise BadSample("not_a_label", f"{name}: {what}")
            values = np.asarray(image).astype(np.uint16)
            # Pillow stretches grey of fewer bits to 0–255, which would change the values.
            if image.mode == "1":
                values = (values > 0).astype(np.uint16)
            elif image.mode == "L" and image.format == "PNG" and data[24] in _GREY_STEPS:
                values //= _GREY_STEPS[data[24]]
            return values
    except BadSample:
        raise
    except UnidentifiedImageError:  # whose text holds an address
        raise BadSample("not_a_label", f"{name}: no image of a format that is known here") from None
    except Exception as error:
        # Pillow's decoders raise nearly anything for damaged files.
        raise BadSample("not_a_label", f"{name}: not a readable label map ({error})") from None


def encode_label(values: NDArray[np.uint8]) -> bytes:
    """An 8-bit grey PNG of uint8 (H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def colour_map(count: int) -> tuple[RGB, ...]:
    """The first colours of Pascal VOC's colour map: the bits of a number dealt to red, green and blue in turn."""
    colours = []
    for number in range(count):
        channels = [0, 0, 0]
        for place in range(8):
            for channel in range(3):
                channels[channel] |= (number >> (3 * place + channel) & 1) << (7 - place)
        colours.append((channels[0], channels[1], channels[2]))
    return tuple(colours)


def built_in_classes(name: str) -> Classes:
    """A table that comes with the package, one of :data:`BUILT_IN`."""
    table = json.loads(files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    rows = table["classes"]
    defaults = colour_map(len(rows))
    return Classes(
        names=tuple(row[0] for row in rows),
        palette=tuple(_rgb(row[1]) if row[1] else defaults[number] for number, row in enumerate(rows)),
        ignored=tuple(table["ignored"]),
        values=tuple(tuple(row[2]) for row in rows),
    )


def load_classes(given: str) -> Classes:
    """Names, and colours if they have some, from a file or from a table that comes with the package.

    Args:
        given: one of :data:`BUILT_IN`; a text file with a name, or a name and three numbers, a line; or YAML or JSON: a
            list of names or of `{name: …, colour: [r, g, b]}`, or a mapping from name to colour. The name `ignore`
            gives a colour of pixels that count for nothing.

    Raises:
        DataError: no such file, or it is not of that form; names the file.
    """
    if given in BUILT_IN:
        return built_in_classes(given)
    path = Path(given)
    where = f"--classes {given}"
    rows = list(_class_rows(_parsed(path, where), where) if path.suffix in _YAML else _class_lines(path, where))
    named = [(name, colour) for name, colour in rows if name.lower() != "ignore"]
    names = tuple(name for name, _ in named)
    if not 0 < len(names) < IGNORE or len(set(names)) < len(names):
        raise DataError(
            f"{where}: {len(names)} classes, {len(set(names))} different; 1 to 255 different ones are needed"
        )
    defaults = colour_map(len(names))
    palette = tuple(colour or defaults[number] for number, (_, colour) in enumerate(named))
    colours: dict[RGB, int] | None = None
    if all(colour for _, colour in rows):
        colours = {colour: number for number, colour in enumerate(palette)}
        if len(colours) < len(palette):
            raise DataError(f"{where}: two classes have the same colour")
        for name, colour in rows:
            if name.lower() == "ignore" and colour and colours.setdefault(colour, IGNORE) != IGNORE:
                raise DataError(f"{where}: {colour} is the colour of a class, and of `ignore`")
    return Classes(names, palette, colours=colours)


def load_id_map(path: Path, classes: Classes) -> dict[int, int]:
    """Class value by label value, from a YAML or JSON mapping: a class value, a class name or `ignore` for each.

    Raises:
        DataError: no such file, or it is not such a mapping; names the entry.
    """
    where = f"--id-map {path}"
    content = _parsed(path, where)
    if not isinstance(content, dict) or not content:
        raise DataError(f"{where}: a mapping from label value to class value is needed, like `7: 0`")
    targets: dict[object, int] = {name: number for number, name in enumerate(classes.names)}
    targets |= {"ignore": IGNORE, IGNORE: IGNORE} | {number: number for number in range(len(classes.names))}
    ids = {}
    for key, target in content.items():
        value = int(key) if re.fullmatch(r"\d{1,5}", str(key)) else -1
        if not 0 <= value < 1 << 16:
            raise DataError(f"{where}: {key!r} is no label value (0 to 65535)")
        if isinstance(target, (bool, float, list, dict)) or target not in targets:
            last = len(classes.names) - 1
            raise DataError(f"{where}: {key}: {target!r} is no class (0 to {last}, or a name) and not `ignore`")
        ids[value] = targets[target]
    return ids


_YAML = (".json", ".yaml", ".yml")


def _parsed(path: Path, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: not YAML or JSON ({error})") from None


def _class_lines(path: Path, where: str) -> Iterable[tuple[str, RGB | None]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        there = ", ".join(BUILT_IN)
        raise DataError(f"{where}: cannot be read ({error.strerror}); tables that come along: {there}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not a text file ({error})") from None
    for line in map(str.strip, lines):
        if line and not line.startswith("#"):
            match = _COLOUR.fullmatch(line)
            yield (match[1], _colour_of([int(n) for n in match.groups()[1:]], where)) if match else (line, None)


def _class_rows(content: Any, where: str) -> Iterable[tuple[str, RGB | None]]:
    if isinstance(content, dict):
        content = [{"name": name, "colour": colour} for name, colour in content.items()]
    if not isinstance(content, list):
        raise DataError(f"{where}: a list of names, or a mapping from name to colour, is needed")
    for row in content:
        if isinstance(row, dict) and "name" in row:
            colour = row.get("colour", row.get("color"))
            yield str(row["name"]), None if colour is None else _colour_of(colour, where)
        elif isinstance(row, (str, int)):
            yield str(row), None
        else:
            raise DataError(f"{where}: {row!r} is no class; write a name, or name and colour")


def _colour_of(value: Any, where: str) -> RGB:
    if isinstance(value, str) and re.fullmatch("#[0-9a-fA-F]{6}", value):
        value = [int(value[place : place + 2], 16) for place in (1, 3, 5)]
    if not isinstance(value, list) or len(value) != 3 or not all(type(v) is int and 0 <= v <= 255 for v in value):
        raise DataError(f'{where}: {value!r} is no colour; write [r, g, b] with 0 to 255, or "#rrggbb"')
    return _rgb(value)


def _rgb(value: Any) -> RGB:
    red, green, blue = value
    return red, green, blue
