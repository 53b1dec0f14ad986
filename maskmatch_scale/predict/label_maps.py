"""Label maps among the inputs: they would be predicted as if they were photos, and nobody wants that."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.images.opening import open_stored, quiet
from maskmatch_scale.errors import UserError
from maskmatch_scale.predict.inputs import ImageFile, Input, suffix
from maskmatch_scale.redact import is_remote

_MOST_FOLDERS = 32
_MOST_PIXELS = 50_000_000
_IGNORED = 255
_MOST_VALUES = 64
_FLAT = 0.98
"""Share of equal neighbours. A page of text has about 0.95."""
_DARK = 32
"""Grey levels below are all but black."""


def refuse_label_maps(inputs: Iterable[Input], palette: tuple[tuple[int, int, int], ...]) -> Path | None:
    """Refuse inputs if the first PNG of one of their folders looks like a label map.

    That is a PNG of one channel whose values are all classes or 255, more than class 0 alone. One with a palette must
    have the colours of the model, too. In a grey one no class may be above 31: it looks all but black, and a dark photo
    of a model with many classes is no label map.

    Args:
        inputs: all of them; the first 32 folders with PNGs are looked at.
        palette: of the model, RGB, one colour a class.

    Returns:
        The first of the other PNGs that were looked at which may be a label map of other values: one channel, few
        values, in areas of one value. Grey drawings may be like that too, so it is not refused.

    Raises:
        UserError: names the file.
    """
    firsts: dict[Path, Path] = {}
    for each in inputs:
        if len(firsts) == _MOST_FOLDERS:
            break
        if isinstance(each, ImageFile) and not is_remote(each.location) and suffix(each.location) == ".png":
            firsts.setdefault(Path(each.location).parent, Path(each.location))
    suspect = None
    for path in firsts.values():
        certain, possible = _looked_at(path, palette)
        if certain:
            raise UserError(
                f"{path}: this looks like a label map (one channel, and all its values are classes of the model); name "
                "the folder of the images alone, or a pattern such as 'photos/*.jpg'"
            )
        suspect = suspect or (path if possible else None)
    return suspect


def _looked_at(path: Path, palette: tuple[tuple[int, int, int], ...]) -> tuple[bool, bool]:
    """Whether a PNG is a label map of the model, and whether it may be one of other values."""
    try:
        with quiet(), open_stored(path) as image:
            if image.mode not in ("L", "P") or image.width * image.height > _MOST_PIXELS:
                return False, False
            return _has_classes_alone(image, palette), _has_flat_areas(np.asarray(image))
    except Exception:  # a damaged file is said when it is its turn
        return False, False


def _has_flat_areas(values: NDArray[np.uint8]) -> bool:
    """Whether uint8 (H, W) holds few values, more than one, and nearly all neighbours in a row or column are equal."""
    if not 1 < np.count_nonzero(np.bincount(values.ravel(), minlength=256)) <= _MOST_VALUES or min(values.shape) < 2:
        return False
    same = [float(np.mean(a == b)) for a, b in ((values[1:], values[:-1]), (values[:, 1:], values[:, :-1]))]
    return min(same) >= _FLAT


def _has_classes_alone(image: Image.Image, palette: tuple[tuple[int, int, int], ...]) -> bool:
    counts = np.bincount(np.asarray(image).ravel(), minlength=256)
    classes = len(palette)
    if counts[classes:_IGNORED].any() or not counts[1:classes].any():
        return False
    if image.mode == "L":
        return not counts[_DARK:_IGNORED].any()
    stored = np.array(image.getpalette() or [], np.uint8).reshape(-1, 3)
    used = np.flatnonzero(counts[:classes])
    return len(stored) > used.max() and bool((stored[used] == np.array(palette, np.uint8)[used]).all())
