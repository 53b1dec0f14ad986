"""Names and colours of classes, and the label values that stand for them: tables of the package, files of the user."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from maskmatch_scale.data.faults import DataError

IGNORE = 255
"""Label value of ignored pixels in the shards."""

BUILT_IN = ("voc", "cityscapes", "ade20k", "coco_stuff", "coco")
"""Tables of classes that come with the package: `NAME.json` beside this file, which says whose table it follows."""

RGB = tuple[int, int, int]

_COLOUR = re.compile(r"(.*?)[\s,;]+(\d+)[\s,;]+(\d+)[\s,;]+(\d+)")
_YAML = (".json", ".yaml", ".yml")


@dataclass(frozen=True)
class Classes:
    """Names and colours of classes.

    Attributes:
        names: by class value.
        palette: one colour a class.
        ignored: label values of ignored pixels in a data set's own files.
        values: label values of a data set's own files, by class; None: they are the class values.
        colours: class value by colour of RGB label maps, `IGNORE` for ignored pixels; None: not given.
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
            gives a colour of ignored pixels.

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
    if not 0 < len(names) < IGNORE:
        raise DataError(f"{where}: {len(names)} classes in it; 1 to {IGNORE - 1} are needed, a name a line")
    if twice := next((name for number, name in enumerate(names) if name in names[:number]), None):
        raise DataError(f"{where}: the class {twice!r} is in it twice; give each a name of its own")
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
        raise DataError(f"{where}: a mapping from label value to class is needed, a line each, like `7: 0`")
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
        raise DataError(f"{where}: cannot be read ({error.strerror}); tables of the package: {there}") from None
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
