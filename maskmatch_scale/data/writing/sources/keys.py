"""Keys of samples, from the paths of their images."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np


def keys_of(images: Sequence[str], key_root: str = "") -> list[str]:
    """A key for each path: without folders that `key_root` matches and without ending, `.` and `/` replaced by `_`.

    Where several paths come to the same key, each of them gets a hash of its path added, so that no key depends on the
    order of the paths.
    """
    start = re.compile(key_root) if key_root else None
    keys = [_key(path, start) for path in images]
    # By hashes first, because a set of ten million keys is large.
    hashes = np.fromiter(map(hash, keys), np.int64, len(keys))
    _, place, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    suspects = np.flatnonzero(counts[place] > 1).tolist()
    times = Counter(keys[number] for number in suspects)
    for number in [number for number in suspects if times[keys[number]] > 1]:
        keys[number] += _hash(images[number])
    return keys


def variants_of(key: str, image: str) -> tuple[str, str]:
    """The key of an image without a hash of its path, and with it: another image decides which of them it has."""
    plain = key.removesuffix(_hash(image))
    return plain, plain + _hash(image)


def _hash(image: str) -> str:
    return "-" + hashlib.sha256(image.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _key(path: str, start: re.Pattern[str] | None) -> str:
    if start is not None and (match := start.match(path)):
        path = path[match.end() :]
    name = path[path.rfind("/") + 1 :]
    if "." in name:
        path = path[: path.rfind(".")]
    key = path.strip("/").replace("/", "_").replace(".", "_")
    # Bytes that are no text are replaced. Readers of shards would pass over names such as `__meta__`.
    key = key.encode("utf-8", "replace").decode()
    return f"x{key}" if key.startswith("__") or not key else key
