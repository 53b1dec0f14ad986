"""What other tools note about their shards, as entries of an index of ours.

=================  =========================================  ==============================
written by         file                                       number of samples of a shard
=================  =========================================  ==============================
img2dataset        ``NNNNN_stats.json`` beside ``NNNNN.tar``  ``successes``
wids (webdataset)  a JSON of any name, with ``shardlist``     ``nsamples``
Energon            ``.nv-meta/.info.json`` or ``.info.yaml``  ``shard_counts``
open_clip          ``sizes.json``                             the value of the shard's name
anybody            a text, ``….txt``                          second word of a line
=================  =========================================  ==============================

None of them has a checksum. A shard without samples (of a download in which all failed) is left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from braceexpand import braceexpand

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.index import ShardIndex, ShardTable, StreamEntry

STREAM = "unlabelled"
"""The stream that such an index becomes."""

Row = dict[str, Any]
"""An entry of an index: `file`, `samples`, and `bytes` if they are known."""

_LINE = re.compile(r"(?P<file>\S(?:.*?\S)?)(?:\s+(?P<samples>\d+)(?:\s+(?P<bytes>\d+))?)?")


def parse_json(data: bytes, where: str) -> Any:
    """The content of a JSON file; ``where`` names it in messages.

    Raises:
        DataError: it is not JSON.
    """
    try:
        return json.loads(data)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); write it again") from None


def successes(data: bytes, where: str) -> int:
    """The number of samples of a shard, from its ``NNNNN_stats.json``.

    Raises:
        DataError: it is not JSON, or does not say the number.
    """
    advice = "run img2dataset again for this shard, or count its samples with `maskmatch shards index … --scan`"
    try:
        count = json.loads(data)["successes"]
    except (ValueError, KeyError, TypeError) as error:
        said = "no key `successes`" if isinstance(error, (KeyError, TypeError)) else f"not JSON ({error})"
        raise DataError(f"{where}: {said}; {advice}") from None
    if type(count) is not int or count < 0:
        raise DataError(f"{where}: successes: {count!r} is not a number of samples; {advice}")
    return count


def stats_name(tar: str) -> str:
    """Name of the file in which img2dataset counts the samples of a shard ``….tar``."""
    return f"{tar.removesuffix('.tar')}_stats.json"


def wids(content: Mapping[str, Any], where: str) -> list[Row]:
    """The shards of a wids list, those of its ``datasets`` included.

    Raises:
        DataError: it is not such a list, or refers to other lists.
    """
    shards = list(_list(content.get("shardlist"), f"{where}: shardlist"))
    for number, part in enumerate(_list(content.get("datasets"), f"{where}: datasets")):
        if not isinstance(part, Mapping) or "shardlist" not in part or part.get("base"):
            raise DataError(
                f"{where}: datasets: a part refers to another list, which is not followed; give each list its own "
                "source, or one list with all shards"
            )
        shards.extend(_list(part["shardlist"], f"{where}: datasets.{number}.shardlist"))
    rows = []
    for number, shard in enumerate(shards):
        if not isinstance(shard, Mapping) or not isinstance(shard.get("url"), str) or "nsamples" not in shard:
            raise DataError(f"{where}: shardlist.{number}: it needs `url` and `nsamples`; write the list again")
        rows.append({"file": shard["url"], "samples": shard["nsamples"], "bytes": shard.get("filesize") or None})
    return rows


def sizes(content: Mapping[str, Any]) -> list[Row]:
    """The shards of open_clip's ``sizes.json``: number of samples by name."""
    return [{"file": file, "samples": int(n) if str(n).isdecimal() else n} for file, n in content.items()]


def energon(info: Any, splits: Any, where: str, folder: str = "") -> dict[str, list[Row]]:
    """The shards of an Energon data set, by stream.

    Args:
        info: content of ``.info.json``.
        splits: content of ``split.yaml`` (or ``split.json``); None if there is none.
        where: names the data set in messages.
        folder: put before the names of shards, which are relative to the folder above ``.nv-meta``.

    Returns:
        ``unlabelled``: the shards of its part ``train``; those of no part, if it has no such part. Its other parts by
        their names.

    Raises:
        DataError: they are not what Energon writes, name a shard that is not counted, or leave out single samples.
    """
    counts = info.get("shard_counts") if isinstance(info, Mapping) else None
    if not isinstance(counts, Mapping):
        raise DataError(f"{where}: no `shard_counts`; run `energon prepare` again")
    splits = splits if isinstance(splits, Mapping) else {}
    left_out = _names(splits.get("exclude"), f"{where}: split.yaml: exclude")
    if not left_out <= counts.keys():
        one = min(left_out - counts.keys())
        raise DataError(
            f"{where}: split.yaml excludes {one!r}, which is no shard; single samples cannot be left out: write the "
            "shard without it, and `energon prepare` again"
        )
    named = splits.get("split_parts") or {}
    if not isinstance(named, Mapping):
        raise DataError(f"{where}: split.yaml: split_parts: not a list of shards for each part; write it again")
    parts = {str(name): _names(names, f"{where}: split.yaml: split_parts.{name}") for name, names in named.items()}
    for name, names in parts.items():
        if not names <= counts.keys():
            raise DataError(
                f"{where}: part {name!r} of split.yaml names {min(names - counts.keys())!r}, whose samples are not "
                "counted; run `energon prepare` again"
            )
    train = parts.pop("train", set(counts).difference(*parts.values()))
    streams = {STREAM: train, **parts}
    return {
        name: [
            {"file": f"{folder}{file}", "samples": samples}
            for file, samples in counts.items()
            if file in names and file not in left_out
        ]
        for name, names in streams.items()
    }


def _names(patterns: Any, where: str) -> set[str]:
    try:
        return {name for pattern in _list(patterns, where) for name in braceexpand(str(pattern))}
    except ValueError as error:
        raise DataError(f"{where}: {error}; write shards/{{000..127}}.tar") from None


def _list(content: Any, where: str) -> list[Any]:
    """A list of a file, or an empty one where it has none; ``where`` names it in messages."""
    if content is not None and not isinstance(content, list):
        raise DataError(f"{where}: not a list but {type(content).__name__}; write it again")
    return content or []


def plain_list(data: bytes, where: str) -> list[Row]:
    """The shards of a text: ``LOCATION [SAMPLES [BYTES]]`` in each line; ``#`` begins a comment.

    Returns:
        Their entries; ``samples`` is None where the line does not say it.

    Raises:
        DataError: it is not a text.
    """
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not a text ({error}); write the location of a shard a line") from None
    rows = []
    for line in map(str.strip, lines):
        if line and not line.startswith("#"):
            match = _LINE.fullmatch(line)
            assert match is not None
            counts = {name: None if match[name] is None else int(match[name]) for name in ("samples", "bytes")}
            rows.append({"file": match["file"], "samples": counts["samples"], "bytes": counts["bytes"] or None})
    return rows


def as_index(source: str, streams: Mapping[str, list[Row]], where: str) -> ShardIndex:
    """An index of ours.

    Args:
        source: what wrote the entries.
        streams: entries by stream; those without samples are left out.
        where: names the file in messages.

    Raises:
        DataError: an entry is not well formed.
    """
    tables = {}
    for name, rows in streams.items():
        try:
            tables[name] = ShardTable(row for row in rows if row["samples"] != 0)
        except ValueError as error:
            raise DataError(f"{where}: shard {error}; write it again") from None
    return ShardIndex(
        source=source, streams={name: StreamEntry(labelled=False, shards=table) for name, table in tables.items()}
    )


def of_json(content: Any, where: str, splits: Callable[[], Any]) -> tuple[str, dict[str, list[Row]]] | None:
    """Which tool wrote a JSON, and its entries by stream; None if it is none that is known.

    Args:
        content: of the file.
        where: names it in messages.
        splits: gives the content of the ``split.yaml`` beside it; None if there is none.

    Raises:
        DataError: it is of one, but not well formed.
    """
    if isinstance(content, list) and content and isinstance(content[0], Mapping) and "nsamples" in content[0]:
        content = {"shardlist": content}
    if not isinstance(content, Mapping) or "streams" in content:
        return None
    if "shardlist" in content or "datasets" in content:
        return "wids", {STREAM: wids(content, where)}
    if "shard_counts" in content:
        return "energon", energon(content, splits(), where, "../")
    if content and all(str(name).endswith(".tar") for name in content):
        return "open_clip", {STREAM: sizes(content)}
    return None


def parse_yaml(data: bytes, where: str) -> Any:
    """The content of a YAML file; ``where`` names it in messages.

    Raises:
        DataError: it is not YAML.
    """
    try:
        return yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: not YAML ({' '.join(str(error).split())}); write it again") from None
