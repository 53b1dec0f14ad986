"""`maskmatch shards verify | show | index`, for shards that exist. Large libraries are imported only when one runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from maskmatch_scale.cli import (
    shard_sources,  # noqa: F401 - adds the commands of the sources
    shards_merge,  # noqa: F401 - adds a command
    verified,
)
from maskmatch_scale.cli.shards_write import print_index, print_notes, propose, shards_app
from maskmatch_scale.errors import UserError
from maskmatch_scale.redact import is_remote, shown

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from maskmatch_scale.recipe import DataRecipe

__all__ = ["shards_app"]

_Root = Annotated[str, typer.Argument(metavar="ROOT", help="Shard folder or its index.json: a path or a URL.")]
_CacheDir = Annotated[
    str | None, typer.Option(metavar="DIR", help="Folder for shards that are fetched from a URL (data.cache_dir).")
]
_AllowPipe = Annotated[
    bool,
    typer.Option("--allow-pipe", help="Allow shards called pipe:COMMAND, which run a shell command (data.allow_pipe)."),
]


@shards_app.command("verify", epilog="Example: maskmatch shards verify data/scores --json > faults.jsonl")
def verify(
    root: _Root,
    shallow: Annotated[
        bool, typer.Option("--shallow", help="Check only headers and checksums; decode no image.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: one for a small folder, else one for each core.")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print each fault as a JSON object on stdout, and last `summary`: pixels of each class."
        ),
    ] = False,
    cache_dir: _CacheDir = None,
    allow_pipe: _AllowPipe = False,
) -> None:
    """Check every shard and every sample against the index, name each fault, and count the pixels of each class."""
    from maskmatch_scale.data.shards.folder import ShardOpener, load_index

    data = _data(root, cache_dir, allow_pipe)
    index = load_index(root, data, key="", parts=True)
    from maskmatch_scale.data.tools.verify import verify as faults_of  # it imports torch

    count = 0
    labels: dict[str, NDArray[np.int64]] = {}
    faults = faults_of(
        root,
        deep=not shallow,
        progress=True,
        workers=workers,
        index=index,
        open_shard=ShardOpener(root, data),
        labels=labels,
    )
    for fault in faults:
        count += 1
        if as_json:
            print(json.dumps(fault.as_json(), ensure_ascii=False))  # noqa: T201
        else:
            print(fault, file=sys.stderr)  # noqa: T201
    if as_json:
        print(json.dumps({"summary": verified.as_json(index, labels, count)}, ensure_ascii=False))  # noqa: T201
    else:
        print_index(index, root)
        verified.print_labels(index, labels)
        for line in verified.warnings_of(index, labels):
            print(f"warning: {line}", file=sys.stderr)  # noqa: T201
    samples = sum(stream.samples for stream in index.streams.values())
    if count:
        raise UserError(f"{shown(root)}: {samples} samples, {count} fault{'s' if count > 1 else ''}, named above")
    if not as_json:
        print(f"{samples} samples, no faults")  # noqa: T201


@shards_app.command("show", epilog="Example: maskmatch shards show data/scores --stream labelled --out sheet.png")
def show(
    root: _Root,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="PNG to write. Default: contact-sheet.png in the shard folder; for a URL, here."
        ),
    ] = None,
    stream: Annotated[str | None, typer.Option(help="Show only this stream.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Number of samples of each stream.")] = 12,
    seed: Annotated[int, typer.Option(help="Seed of the choice of samples.")] = 0,
    cache_dir: _CacheDir = None,
    allow_pipe: _AllowPipe = False,
) -> None:
    """Draw a contact sheet: samples of each stream, with label maps in the colours of their classes."""
    from maskmatch_scale.data.shards.folder import ShardOpener, load_index

    data = _data(root, cache_dir, allow_pipe)
    index = load_index(root, data, key="", parts=True)
    if stream is not None and stream not in index.streams:
        raise UserError(f"--stream {stream}: no such stream in {shown(root)}, which has {', '.join(index.streams)}")
    from maskmatch_scale.data.tools.show import contact_sheet  # it imports torch

    if out is None:
        folder = Path() if is_remote(root) else Path(root).parent if Path(root).is_file() else Path(root)
        out = folder / "contact-sheet.png"
    sheet = contact_sheet(
        root, out, stream=stream, count=count, seed=seed, index=index, open_shard=ShardOpener(root, data)
    )
    Console().print(str(sheet), soft_wrap=True, highlight=False, markup=False)


@shards_app.command(
    "index",
    epilog="Example: maskmatch shards index 'https://example.org/{0000..0999}.tar' data/theirs",
)
def index_command(
    patterns: Annotated[
        list[str],
        typer.Argument(
            metavar="PATTERN… OUT",
            help="Shards without labels: patterns, folders with an index of any kind, lists; last the folder to write.",
        ),
    ],
    labelled: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Shards with label maps. Can be given several times.")
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATTERN",
            help="Labelled shards of another stream, such as dev or val. Can be given several times.",
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Names of the classes, in a file as for `shards write`. Required with labelled shards."
        ),
    ] = None,
    ignore_index: Annotated[int, typer.Option(min=0, max=255, help="Label value of pixels that are ignored.")] = 255,
    bands: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Names of the pages of the images, in their order: red,green,blue,nir."),
    ] = None,
    value_range: Annotated[
        str | None,
        typer.Option(
            metavar="LOW:HIGH",
            help="Values that become 0 and 255, for all bands or for some: 0:3000,nir=0:6000. Required with --bands.",
        ),
    ] = None,
    rescan: Annotated[
        bool, typer.Option("--rescan", help="Look at all shards again, also at those of an earlier call.")
    ] = False,
    scan: Annotated[
        bool,
        typer.Option("--scan", help="Open every shard, also those whose samples an index says: counts and checksums."),
    ] = False,
    add: Annotated[
        bool, typer.Option("--add", help="Keep the streams of the index that is there, and append to them.")
    ] = False,
    offsets: Annotated[
        bool,
        typer.Option(
            "--offsets", help="Also write where samples begin, so that a first batch need not wait for whole shards."
        ),
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: the cores.")] = None,
    cache_dir: _CacheDir = None,
    allow_pipe: _AllowPipe = False,
) -> None:
    """Write an index for existing shards, and a wids list of each stream.

    Shards are opened for counts and checksums, unless an index or a note of another tool says how many samples they
    have (img2dataset, wids, Energon, open_clip). If interrupted, it continues where it stopped. Called again with more
    shards, it looks only at the new ones.
    """
    from maskmatch_scale.data.shards.folder import fetch_options
    from maskmatch_scale.data.tools.labels_beside import streams_with_labels_beside
    from maskmatch_scale.data.tools.survey import Meaning, survey
    from maskmatch_scale.data.writing.sources.band_options import given_bands
    from maskmatch_scale.data.writing.sources.classes import load_classes

    *unlabelled, out = patterns
    streams: dict[str, list[str]] = {}
    for name, found in (("labelled", labelled or []), *map(_named_pattern, split or [])):
        if found:
            streams.setdefault(name, []).extend(found)
    with_labels = tuple(streams)
    if unlabelled:
        streams["unlabelled"] = unlabelled
    if not streams:
        raise UserError("no shards: give patterns and then the folder to write to, e.g. 'shards/{000..127}.tar' data/x")
    if with_labels and classes is None and not add:
        raise UserError("labelled shards: --classes FILE must say what the label values mean")
    if value_range is not None and bands is None:
        raise UserError(f"--value-range {value_range}: --bands must name the bands that it is for")
    named_bands = () if bands is None else given_bands(bands, value_range)
    named = load_classes(classes) if classes else None
    index = survey(
        streams,
        with_labels,
        Path(out),
        fetch_options(_data(out, cache_dir, allow_pipe)),
        Meaning(tuple(named.names) if named else (), tuple(named.palette) if named else (), ignore_index, named_bands),
        rescan=rescan,
        scan=scan,
        add=add,
        offsets=offsets,
        workers=workers,
        progress=True,
    )
    print_index(index, Path(out))
    print_notes(
        f"stream {name!r}: each image of its first shard has a .png beside it, which is not read; if these are label "
        "maps, give the shards as --labelled PATTERN --classes FILE"
        for name in streams_with_labels_beside(index, Path(out))
    )
    propose("to check every shard and sample", "verify", out)


def _named_pattern(text: str) -> tuple[str, list[str]]:
    name, equals, pattern = text.partition("=")
    if not (name and equals and pattern):
        raise UserError(f"--split {text}: write NAME=PATTERN, e.g. val='shards/val-{{00..07}}.tar'")
    return name, [pattern]


def _data(root: str, cache_dir: str | None, allow_pipe: bool) -> DataRecipe:
    from maskmatch_scale.recipe import DataRecipe

    return DataRecipe(root=root, cache_dir=cache_dir, allow_pipe=allow_pipe)
