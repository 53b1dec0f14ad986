"""`maskmatch shards write`: the options that all sources share, and how a source becomes a command of its own."""

from __future__ import annotations

import inspect
import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maskmatch_scale.errors import UserError
from maskmatch_scale.redact import shown

if TYPE_CHECKING:
    from maskmatch_scale.data.shards.index import ShardIndex
    from maskmatch_scale.data.writing.sources.image_files import ImageFiles
    from maskmatch_scale.data.writing.sources.options import Options

shards_app = typer.Typer(
    help="Write, check and show shard folders.",
    epilog="Example: maskmatch shards write scores data/scores",
    no_args_is_help=True,
)


class _Sources(typer.core.TyperGroup):
    """The commands of the sources. An unknown source is an error of one line that lists the known ones."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        command = super().get_command(ctx, cmd_name)
        if command is None:
            raise UserError(f"unknown source {cmd_name!r}; there are: {', '.join(self.commands)}")
        return command


write_app = typer.Typer(
    cls=_Sources,
    help="Write a data set as shards. The result is always the same. If it is interrupted, run it again to continue.",
    epilog="Example: maskmatch shards write scores data/scores",
    no_args_is_help=True,
    subcommand_metavar="SOURCE …",
)
shards_app.add_typer(write_app, name="write")


LABELS, SPLITS, BANDS, WRITING = "Label maps", "Splits", "Bands", "Writing"

PartOption = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Write only part I of N, on one of N machines, to a folder of its own; `shards merge` joins the parts.",
        rich_help_panel=WRITING,
    ),
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Delete what an earlier call has written to OUT, finished or not, and write anew.",
        rich_help_panel=WRITING,
    ),
]


@dataclass(frozen=True)
class SharedOptions:
    """The options of every source of image files, one for each field.

    The source gets the fields that are also in `Options`.
    """

    classes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Names of the classes in the order of their values: a text file with a name in each line (followed by "
            "`r g b` for RGB label maps), YAML or JSON; or voc, cityscapes, ade20k, coco_stuff, coco.",
            rich_help_panel=LABELS,
        ),
    ] = None
    id_map: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML or JSON that maps raw label values to class values, class names or `ignore`.",
            rich_help_panel=LABELS,
        ),
    ] = None
    unknown_as_ignore: Annotated[
        bool,
        typer.Option(
            "--unknown-as-ignore",
            help="Ignore label values that have no class, instead of stopping.",
            rich_help_panel=LABELS,
        ),
    ] = False
    split_labelled: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="List of labelled samples in UniMatch's format: `image label` in each line, relative to the root.",
            rich_help_panel=SPLITS,
        ),
    ] = None
    split_unlabelled: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="List of unlabelled samples in the same format. Default: the rest of the training set.",
            rich_help_panel=SPLITS,
        ),
    ] = None
    split_val: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="List of validation samples in the same format.", rich_help_panel=SPLITS),
    ] = None
    dev: Annotated[
        str | None,
        typer.Option(
            metavar="N|SHARE",
            help="Labelled samples to hold out for choosing hyper-parameters: a number (100) or a share (0.1).",
            rich_help_panel=SPLITS,
        ),
    ] = None
    split_seed: Annotated[int, typer.Option(help="Seed of the choice of held-out samples.", rich_help_panel=SPLITS)] = 0
    max_side: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="PX", help="Shrink images whose longer side is larger than this.", rich_help_panel=WRITING
        ),
    ] = None
    tile: Annotated[
        int | None,
        typer.Option(metavar="PX", help="Cut images that are larger into tiles of this side.", rich_help_panel=WRITING),
    ] = None
    overlap: Annotated[
        int | None,
        typer.Option(metavar="PX", help="How far tiles overlap their neighbours. Default: 0.", rich_help_panel=WRITING),
    ] = None
    apply_exif: Annotated[
        bool,
        typer.Option(
            "--apply-exif",
            help="Turn photos upright that are stored turned (EXIF orientation), for label maps drawn upright.",
            rich_help_panel=WRITING,
        ),
    ] = False
    shuffle_seed: Annotated[
        int,
        typer.Option(help="Seed of the order of samples; -1 keeps the order of the data set.", rich_help_panel=WRITING),
    ] = 0
    keep_duplicates: Annotated[
        bool,
        typer.Option(
            "--keep-duplicates", help="Also write images that are equal to another one.", rich_help_panel=WRITING
        ),
    ] = False
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad", help="Leave bad samples out and list them, instead of stopping.", rich_help_panel=WRITING
        ),
    ] = False
    bands: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Names of all bands of the images, in their order: red,green,blue,nir; - leaves a band out. Default: "
            "images are stored as RGB of 8 bits.",
            rich_help_panel=BANDS,
        ),
    ] = None
    value_range: Annotated[
        str | None,
        typer.Option(
            metavar="LOW:HIGH",
            help="Values that become 0 and 255 when images are read: for all bands or for some: 0:3000,nir=0:6000; or "
            "auto: percentiles 0.5 and 99.5 of up to 64 images. Default: 0:255, for images of 8 bits.",
            rich_help_panel=BANDS,
        ),
    ] = None
    part: PartOption = None
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="Write only the images that OUT does not have, to new shards; those that are there stay.",
            rich_help_panel=WRITING,
        ),
    ] = False
    overwrite: OverwriteOption = False
    samples_per_shard: Annotated[
        int, typer.Option(min=1, help="Largest number of samples in a shard.", rich_help_panel=WRITING)
    ] = 256
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: one for each core.", rich_help_panel=WRITING)
    ] = None

    def of_source(self, **others: Any) -> Options:
        """The options of a source: those that it shares with others, and ``others`` that only it has."""
        from maskmatch_scale.data.writing.sources.options import Options

        known = {field.name for field in fields(Options)}
        return Options(**{name: value for name, value in vars(self).items() if name in known}, **others)


def source_command(name: str, example: str) -> Callable[[Callable[..., ImageFiles]], Callable[..., ImageFiles]]:
    """Decorate a function that makes a source, and add a command that writes the source as shards.

    The command has the function's parameters and OUT. In place of the parameter `shared` it has the options of
    :class:`SharedOptions`.

    Args:
        name: name of the command.
        example: arguments of the example in its help.
    """

    def register(make: Callable[..., ImageFiles]) -> Callable[..., ImageFiles]:
        def run(out: Path, **given: Any) -> None:
            shared = SharedOptions(**{field.name: given.pop(field.name) for field in fields(SharedOptions)})
            _write(make(**given, shared=shared), out, shared)

        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [p for p in inspect.signature(make).parameters.values() if p.name != "shared"]
        hints = {
            "out": Annotated[Path, typer.Argument(metavar="OUT", help="Shard folder to write.")],
            **get_type_hints(SharedOptions, include_extras=True),
            **get_type_hints(make, localns={"ImageFiles": Any}, include_extras=True),
        }
        parameters = [
            *(p.replace(kind=keyword, annotation=hints[p.name]) for p in own[:1]),
            inspect.Parameter("out", keyword, annotation=hints["out"]),
            *(p.replace(kind=keyword, annotation=hints[p.name]) for p in own[1:]),
            *(
                inspect.Parameter(field.name, keyword, default=field.default, annotation=hints[field.name])
                for field in fields(SharedOptions)
            ),
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__doc__ = make.__doc__
        write_app.command(name, epilog=f"Example: maskmatch shards write {name} {example}")(run)
        return make

    return register


def _write(source: ImageFiles, out: Path, shared: SharedOptions) -> None:
    from maskmatch_scale.data.shards.label_pixels import ignored_notes
    from maskmatch_scale.data.writing import Part, append_shards, write_shards

    print_notes((*source.notes, *source.found, *source.value_notes))
    options: Any = {
        "workers": shared.workers,
        "samples_per_shard": shared.samples_per_shard,
        "skip_bad": shared.skip_bad,
        "overwrite": shared.overwrite,
    }
    if shared.append:
        if shared.part is not None:
            raise UserError("--append and --part exclude each other: append on one machine")
        appended = append_shards(source, out, **options)
        index = appended.index
        print_notes((*appended.notes, f"appended: {_counted(appended.samples)}"))
    else:
        part = Part.parse(shared.part) if shared.part is not None else None
        index = write_shards(source, out, part=part, **options)
    print_index(index, out)
    for what, where in _left_out(out):
        Console(stderr=True).print(f"{what}: {where}", soft_wrap=True, highlight=False, markup=False)
    print_notes(ignored_notes(index))
    print_warnings(index)
    propose("to look at them", "show", out)


def print_warnings(index: ShardIndex) -> None:
    """Print, on stderr, which classes never occur in a labelled stream, and where most pixels are ignored."""
    from maskmatch_scale.data.shards.label_pixels import index_warnings

    for line in index_warnings(index):
        Console(stderr=True).print(f"warning: {line}", soft_wrap=True, highlight=False, markup=False)


def propose(what: str, command: str, folder: str | Path) -> None:
    """Say on stderr what may be done with a shard folder next.

    Args:
        what: it is good for.
        command: of `maskmatch shards`.
        folder: the shard folder.
    """
    line = f"{what}: maskmatch shards {command} {shlex.quote(shown(str(folder)))}"
    Console(stderr=True).print(line, soft_wrap=True, highlight=False, markup=False)


def _left_out(out: Path) -> Iterator[tuple[str, Path]]:
    """What of a data set was not written, in words with its number; and the file that lists it."""
    from maskmatch_scale.data.writing import DUPLICATES_NAME, SKIPPED_NAME
    from maskmatch_scale.data.writing.protocol import LEFT_OUT

    duplicates, skipped = out / DUPLICATES_NAME, out / SKIPPED_NAME
    if duplicates.is_file() and (lines := duplicates.read_bytes().count(b"\n")):
        yield f"{lines} images dropped as duplicates", duplicates
    if skipped.is_file():
        with skipped.open("rb") as file:
            reasons = Counter(json.loads(line)["reason"] for line in file)
        for reason, words in LEFT_OUT.items():
            if tiles := reasons.pop(reason, 0):
                yield f"{tiles} tiles left out that {words}", skipped
        if reasons:
            yield f"{reasons.total()} bad samples left out", skipped


def print_notes(notes: Iterable[str]) -> None:
    """Print what the user should know, on stderr."""
    for note in notes:
        Console(stderr=True).print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)


def _counted(samples: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in samples.items()) or "nothing, no image is new"


def print_index(index: ShardIndex, root: str | Path) -> None:
    """Print a table of the streams of a shard folder."""
    part = "" if index.part is None else f", only part {index.part}"
    table = Table(title=Text(f"{shown(str(root))}: {len(index.classes)} classes{part}"))
    for column in ("stream", "labels", "samples", "shards", "MB"):
        table.add_column(column, justify="left" if column == "stream" else "right")
    for name, stream in index.streams.items():
        labels = "yes" if stream.labelled else "no"
        sizes = stream.shards.bytes
        size = f"{int(sizes.sum()) / 1e6:.1f}" if sizes.all() else "unknown"
        table.add_row(Text(name), labels, str(stream.samples), str(len(stream.shards)), size)
    Console().print(table)
    if index.bands:
        bands = ", ".join(f"{band.name} {band.low:g}:{band.high:g}" for band in index.bands)
        Console().print(f"bands: {bands}", soft_wrap=True, highlight=False, markup=False)
