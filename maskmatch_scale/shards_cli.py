"""The `maskmatch shards` commands. Nothing heavy is imported until one runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from maskmatch_scale.errors import UserError

if TYPE_CHECKING:
    from maskmatch_scale.data.index import ShardIndex

shards_app = typer.Typer(help="Write and check shard folders.", no_args_is_help=True)


class _Sources(typer.core.TyperGroup):
    """A source that is not there is a user's mistake like any other: one line."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is None:
            raise UserError(f"source {cmd_name!r} is unknown; there are: {', '.join(self.commands)}")
        return command


write_app = typer.Typer(
    cls=_Sources,
    help="Write a data set as shards: deterministic, restartable after a kill, at once if they are there already.",
    epilog="Example: maskmatch shards write scores data/scores",
    no_args_is_help=True,
    subcommand_metavar="SOURCE …",
)
shards_app.add_typer(write_app, name="write")


@write_app.command("scores", epilog="Example: maskmatch shards write scores data/scores")
def write_scores(
    out: Annotated[Path, typer.Argument(help="Shard folder to write.")],
    seed: Annotated[int, typer.Option(help="Of the split and the ageing.")] = 0,
    labelled: Annotated[int, typer.Option(min=0, help="Pages with labels, in one font.")] = 16,
    unlabelled: Annotated[int, typer.Option(min=0, help="Pages without, in four fonts.")] = 290,
    dev: Annotated[int, typer.Option(min=0, help="Pages for choosing hyper-parameters, in four fonts.")] = 16,
    val: Annotated[int, typer.Option(min=0, help="Held-out pages, in four fonts.")] = 32,
    val_font: Annotated[int, typer.Option(min=0, help="Held-out pages in a fifth font.")] = 16,
    size: Annotated[int, typer.Option(min=64, help="Side of a page, px.")] = 512,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: the cores.")] = None,
) -> None:
    """Real scores, engraved and aged like scans, with exact labels."""
    from maskmatch_scale.data.sources.scores import ScoresSource
    from maskmatch_scale.data.write import write_shards

    pages = ScoresSource(
        seed=seed, labelled=labelled, unlabelled=unlabelled, dev=dev, val=val, val_font=val_font, size=size
    )
    print_index(write_shards(pages, out, workers=workers), out)


@shards_app.command("verify", epilog="Example: maskmatch shards verify data/scores")
def verify(root: Annotated[Path, typer.Argument(help="Shard folder.")]) -> None:
    """Check sizes, checksums and samples of every shard against the index; names each fault."""
    from maskmatch_scale.data.index import ShardIndex
    from maskmatch_scale.data.shards import verify as faults_of

    faults = faults_of(root)
    for fault in faults:
        print(fault, file=sys.stderr)  # noqa: T201
    if faults:
        raise UserError(f"{root}: {len(faults)} faults, named above")
    print_index(ShardIndex.load(root), root)


def print_index(index: ShardIndex, root: Path) -> None:
    """A table of the streams of a folder."""
    table = Table(title=f"{root}: {len(index.classes)} classes")
    for column in ("stream", "labels", "samples", "shards", "MB"):
        table.add_column(column, justify="left" if column == "stream" else "right")
    for name, stream in index.streams.items():
        labels = "yes" if stream.labelled else "no"
        size = int(stream.shards.bytes.sum()) / 1e6
        table.add_row(name, labels, str(stream.samples), str(len(stream.shards)), f"{size:.1f}")
    Console().print(table)
