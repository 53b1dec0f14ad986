"""Which class the names in annotations stand for, and the pixels that no annotation covers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.writing.sources.classes import IGNORE, Classes, colour_map, load_classes
from maskmatch_scale.data.writing.sources.options import Options

BACKGROUND = "background"
"""Default name of the class of pixels that no annotation covers."""
_IGNORED = ("ignore", "__ignore__")
"""Names that stand for ignored pixels: that of `--background`, and labelme's."""
_SHOWN = 8


@dataclass(frozen=True)
class Annotated:
    """What becomes of annotations.

    Attributes:
        classes: names and colours.
        values: class value, or `IGNORE`, by name of an annotation.
        rest: class value, or `IGNORE`, of pixels that no annotation covers.
    """

    classes: Classes
    values: Mapping[str, int]
    rest: int


def annotated_classes(
    names: Sequence[str],
    counts: Counter[str],
    given: str | None,
    background: str | None,
    others: str,
    where: str,
    notes: list[str],
) -> Annotated:
    """The classes of a data set of annotations.

    Args:
        names: of its categories, in their order.
        counts: annotations by category.
        given: `--classes`, a file or table that chooses and orders categories; None: all of them.
        background: name of the class of pixels that no annotation covers, the first one unless `given` or `names` have
            it; `ignore`: there is no such class. None: as `ignore`, and it cannot be chosen.
        others: `ignore` or `background`: what becomes of annotations of categories that `given` leaves out.
        where: the data set, for messages.
        notes: what the user should know is added.

    Raises:
        DataError: a class that is no category, or options that do not go together.
    """
    rest_ignored = background is None or background.lower() in _IGNORED
    if others not in ("ignore", BACKGROUND):
        raise DataError(f"--others {others}: ignore or background")
    if others == BACKGROUND and rest_ignored:
        raise DataError("--others background: there is no class for the background here")
    listed = [name for name in names if name.lower() not in _IGNORED]
    if given is None:
        classes = Classes(tuple(listed), colour_map(len(listed)))
    else:
        classes = without_ignored(load_classes(given))
        if unknown := [name for name in classes.names if name not in listed and name != background]:
            raise DataError(
                f"--classes {given}: {some(unknown)}: no category of {where}; there are: {some(listed, 30)}"
            )
    if rest_ignored:
        rest = IGNORE
    else:
        assert background is not None
        classes, rest = with_background(classes, background)
        if background in listed:
            notes.append(
                f"pixels that no annotation covers become the category {background!r}, with class value {rest}"
            )
    left_out = rest if others == BACKGROUND else IGNORE
    by_name = {name: number for number, name in enumerate(classes.names)}
    values = {name: by_name.get(name, IGNORE if name.lower() in _IGNORED else left_out) for name in names}
    if dropped := [name for name in listed if name not in by_name]:
        told = some([f"{name} ({counts[name]})" for name in dropped])
        also = "" if rest_ignored or others == BACKGROUND else "; --others background makes them background"
        notes.append(
            f"annotations of {len(dropped)} categories that --classes leaves out become "
            f"{'background' if others == BACKGROUND else 'ignored pixels'}: {told}{also}"
        )
    if ignored := [f"{name} ({counts[name]})" for name in names if name.lower() in _IGNORED and counts[name]]:
        notes.append(f"annotations of the category {some(ignored)} become ignored pixels, as its name says")
    if unused := [name for name in classes.names if name in listed and not counts[name] and name != background]:
        notes.append(f"classes without an annotation, which will never occur: {some(unused)}")
    if len(classes.names) >= IGNORE:
        raise DataError(f"{where}: {len(classes.names)} classes; at most {IGNORE - 1} can be; --classes chooses")
    return Annotated(with_values(classes), values, rest)


def with_values(classes: Classes) -> Classes:
    """Classes whose label values are known: nothing has to be found out of files."""
    return replace(classes, values=tuple((number,) for number in range(len(classes.names))))


def without_ignored(classes: Classes) -> Classes:
    """Classes without labelme's `__ignore__`, which is no class."""
    kept = [number for number, name in enumerate(classes.names) if name.lower() not in _IGNORED]
    if len(kept) == len(classes.names):
        return classes
    names = tuple(classes.names[number] for number in kept)
    palette = colour_map(len(kept)) if classes.colours is None else tuple(classes.palette[number] for number in kept)
    return replace(classes, names=names, palette=palette)


def with_background(classes: Classes, name: str) -> tuple[Classes, int]:
    """Classes with one for the background, the first one unless they have it; and its class value."""
    if name in classes.names:
        return classes, classes.names.index(name)
    palette = colour_map(len(classes.names) + 1) if classes.colours is None else ((0, 0, 0), *classes.palette)
    return replace(classes, names=(name, *classes.names), palette=palette), 0


def drawn_options(options: Options) -> Options:
    """The options that are left when annotations have been given their classes.

    Raises:
        DataError: `--id-map`, which annotations have no use for.
    """
    if options.id_map is not None:
        raise DataError("--id-map: annotations have names, not values; --classes chooses and orders them")
    return replace(options, classes=None)


def some(names: Sequence[str], most: int = _SHOWN) -> str:
    """The first of some names, for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
