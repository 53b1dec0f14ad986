"""`maskmatch shards merge`: shard folders put together. Large libraries are imported only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskmatch_scale.cli.shards_write import print_index, print_notes, shards_app
from maskmatch_scale.errors import UserError

if TYPE_CHECKING:
    from maskmatch_scale.data.writing.merge import How


@shards_app.command("merge", epilog="Example: maskmatch shards merge part-1 part-2 --out data/photos")
def merge(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER…", help="All parts of `shards write --part`, or shard folders with the same classes."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Shard folder to make.")],
    move: Annotated[bool, typer.Option("--move", help="Move the shards out of FOLDER.")] = False,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy shards, also where hard links to them could be made.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Also read every shard and compare its checksum.")] = False,
) -> None:
    """Put shard folders together: parts that several machines wrote, or data sets with the same classes.

    Shards get their new names by hard links, which take no room; on another disk they are copied. If it is
    interrupted, run it again to continue.
    """
    from maskmatch_scale.data.writing import merge_shards

    if move and copy:
        raise UserError("--move and --copy exclude each other: give one of them, or neither for hard links")
    how: How = "move" if move else "copy" if copy else "link"
    joined = merge_shards(folders, out, how=how, check=check)
    print_index(joined.index, out)
    print_notes(joined.notes)
