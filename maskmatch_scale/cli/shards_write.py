"""`maskmatch shards write SOURCE`: a command for each data source. Large libraries are imported only when one runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
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


@write_app.command("scores", epilog="Example: maskmatch shards write scores data/scores")
def write_scores(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Shard folder to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the split and of the ageing.")] = 0,
    labelled: Annotated[int, typer.Option(min=0, help="Number of pages with labels, in one font.")] = 16,
    unlabelled: Annotated[int, typer.Option(min=0, help="Number of pages without labels, in four fonts.")] = 290,
    dev: Annotated[int, typer.Option(min=0, help="Number of pages for choosing hyper-parameters, in four fonts.")] = 16,
    val: Annotated[int, typer.Option(min=0, help="Number of held-out pages, in four fonts.")] = 32,
    val_font: Annotated[int, typer.Option(min=0, help="Number of held-out pages in a fifth font.")] = 16,
    size: Annotated[int, typer.Option(min=64, help="Side of a page, px.")] = 512,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one for each core.")] = None,
) -> None:
    """Pages of real music, engraved and made to look like old scans, with exact labels."""
    from maskmatch_scale.data.writing import write_shards
    from maskmatch_scale.scores.source import ScoresSource

    pages = ScoresSource(
        seed=seed, labelled=labelled, unlabelled=unlabelled, dev=dev, val=val, val_font=val_font, size=size
    )
    print_index(write_shards(pages, out, workers=workers), out)


_LABELS, _SPLITS, _WRITING = "Label maps", "Splits", "Writing"


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
            rich_help_panel=_LABELS,
        ),
    ] = None
    id_map: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML or JSON that maps raw label values to class values, class names or `ignore`.",
            rich_help_panel=_LABELS,
        ),
    ] = None
    unknown_as_ignore: Annotated[
        bool,
        typer.Option(
            "--unknown-as-ignore",
            help="Ignore label values that have no class, instead of stopping.",
            rich_help_panel=_LABELS,
        ),
    ] = False
    split_labelled: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="List of labelled samples in UniMatch's format: `image label` in each line, relative to the root.",
            rich_help_panel=_SPLITS,
        ),
    ] = None
    split_unlabelled: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="List of unlabelled samples in the same format. Default: the rest of the training set.",
            rich_help_panel=_SPLITS,
        ),
    ] = None
    split_val: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="List of validation samples in the same format.", rich_help_panel=_SPLITS),
    ] = None
    dev: Annotated[
        str | None,
        typer.Option(
            metavar="N|SHARE",
            help="Labelled samples to hold out for choosing hyper-parameters: a number (100) or a share (0.1).",
            rich_help_panel=_SPLITS,
        ),
    ] = None
    split_seed: Annotated[
        int, typer.Option(help="Seed of the choice of held-out samples.", rich_help_panel=_SPLITS)
    ] = 0
    max_side: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="PX", help="Shrink images whose longer side is larger than this.", rich_help_panel=_WRITING
        ),
    ] = None
    shuffle_seed: Annotated[
        int,
        typer.Option(
            help="Seed of the order of samples; -1 keeps the order of the data set.", rich_help_panel=_WRITING
        ),
    ] = 0
    keep_duplicates: Annotated[
        bool,
        typer.Option(
            "--keep-duplicates", help="Also write images that are equal to another one.", rich_help_panel=_WRITING
        ),
    ] = False
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad", help="Leave bad samples out and list them, instead of stopping.", rich_help_panel=_WRITING
        ),
    ] = False
    samples_per_shard: Annotated[
        int, typer.Option(min=1, help="Largest number of samples in a shard.", rich_help_panel=_WRITING)
    ] = 256
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: one for each core.", rich_help_panel=_WRITING)
    ] = None

    def of_source(self, **others: Any) -> Options:
        """The options of a source: those that it shares with others, and ``others`` that only it has."""
        from maskmatch_scale.data.writing.sources.options import Options

        known = {field.name for field in fields(Options)}
        return Options(**{name: value for name, value in vars(self).items() if name in known}, **others)


_Val = Annotated[
    str | None,
    typer.Option(
        metavar="N|SHARE", help="Labelled samples to hold out for the final evaluation.", rich_help_panel=_SPLITS
    ),
]


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


@source_command("folder", "photos data/photos --labels masks --classes names.txt --dev 0.1 --val 0.2")
def _folder(
    root: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of images.")],
    shared: SharedOptions,
    images: Annotated[
        str | None, typer.Option(help="Folder of the images in SOURCE. Default: images, or SOURCE itself.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Folder of the label maps in SOURCE. Default: labels, masks or annotations.")
    ] = None,
    label_suffix: Annotated[
        str, typer.Option(help="Ending of a label map's name, in place of the image's ending.")
    ] = ".png",
    val: Annotated[
        str | None,
        typer.Option(
            metavar="N|SHARE|FOLDER",
            help="Labelled samples to hold out for the final evaluation. --val and --dev can also name image folders.",
            rich_help_panel=_SPLITS,
        ),
    ] = None,
) -> ImageFiles:
    """A folder of images, with label maps for all, some or none of them."""
    from maskmatch_scale.data.writing.sources.image_folder import image_folder

    return image_folder(root, shared.of_source(val=val), images=images, labels=labels, label_suffix=label_suffix)


@source_command("list", "scans.csv data/scans --classes names.txt --val 200")
def _list(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV with a header line, or JSON lines.")],
    shared: SharedOptions,
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Folder to which the paths in FILE are relative. Default: the folder of FILE."
        ),
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column with the image.")] = "image",
    label_column: Annotated[str, typer.Option(help="Column with the label map; it may be empty or missing.")] = "label",
    stream_column: Annotated[
        str,
        typer.Option(help="Column with the stream (labelled, unlabelled, dev, val, …); it may be empty or missing."),
    ] = "stream",
    val: _Val = None,
) -> ImageFiles:
    """A list of images, as CSV or JSON lines."""
    from maskmatch_scale.data.writing.sources.image_list import image_list

    columns = {"image_column": image_column, "label_column": label_column, "stream_column": stream_column}
    return image_list(file, shared.of_source(val=val), root=root, **columns)


@source_command("voc", "VOCdevkit/VOC2012 data/voc --aug")
def _voc(
    root: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder VOC2012.")],
    shared: SharedOptions,
    aug: Annotated[bool, typer.Option("--aug", help="Also use the labels of SegmentationClassAug.")] = False,
    all_images: Annotated[
        bool, typer.Option("--all-images", help="Use the other images of JPEGImages as unlabelled ones.")
    ] = False,
) -> ImageFiles:
    """Pascal VOC 2012, 21 classes."""
    from maskmatch_scale.data.writing.sources.voc import voc

    return voc(root, shared.of_source(), aug=aug, all_images=all_images)


@source_command("cityscapes", "cityscapes data/cityscapes --train-extra")
def _cityscapes(
    root: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder with leftImg8bit and gtFine.")],
    shared: SharedOptions,
    train_extra: Annotated[
        bool, typer.Option("--train-extra", help="Use the images of leftImg8bit/train_extra as unlabelled ones.")
    ] = False,
) -> ImageFiles:
    """Cityscapes, 19 classes."""
    from maskmatch_scale.data.writing.sources.cityscapes import cityscapes

    return cityscapes(root, shared.of_source(), train_extra=train_extra)


@source_command("ade20k", "ADEChallengeData2016 data/ade20k --dev 500")
def _ade20k(
    root: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder ADEChallengeData2016.")],
    shared: SharedOptions,
    converted: Annotated[
        bool,
        typer.Option(
            "--converted", help="The label maps already have the values 0–149 and 255 (UniMatch-V2's download)."
        ),
    ] = False,
) -> ImageFiles:
    """ADE20K's scene parsing challenge, 150 classes."""
    from maskmatch_scale.data.writing.sources.ade20k import ade20k

    return ade20k(root, shared.of_source(), converted=converted)


@source_command("coco-stuff", "coco data/coco-stuff --unlabeled2017")
def _coco_stuff(
    root: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder with images and stuffthingmaps.")],
    shared: SharedOptions,
    unlabeled2017: Annotated[
        bool, typer.Option("--unlabeled2017", help="Use the images of unlabeled2017 as unlabelled ones.")
    ] = False,
) -> ImageFiles:
    """COCO-Stuff 164k, 171 classes."""
    from maskmatch_scale.data.writing.sources.coco_stuff import coco_stuff

    return coco_stuff(root, shared.of_source(), unlabeled2017=unlabeled2017)


def _write(source: ImageFiles, out: Path, shared: SharedOptions) -> None:
    from maskmatch_scale.data.writing import SKIPPED_NAME, write_shards
    from maskmatch_scale.data.writing.sources.image_files import DUPLICATES_NAME

    console = Console(stderr=True)
    for note in source.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)
    index = write_shards(
        source,
        out,
        workers=shared.workers,
        samples_per_shard=shared.samples_per_shard,
        skip_bad=shared.skip_bad,
    )
    print_index(index, out)
    for name, what in ((DUPLICATES_NAME, "images dropped as duplicates"), (SKIPPED_NAME, "bad samples left out")):
        if (out / name).is_file() and (lines := (out / name).read_bytes().count(b"\n")):
            console.print(f"{lines} {what}: {out / name}", soft_wrap=True, highlight=False, markup=False)


def print_index(index: ShardIndex, root: str | Path) -> None:
    """Print a table of the streams of a shard folder."""
    table = Table(title=Text(f"{shown(str(root))}: {len(index.classes)} classes"))
    for column in ("stream", "labels", "samples", "shards", "MB"):
        table.add_column(column, justify="left" if column == "stream" else "right")
    for name, stream in index.streams.items():
        labels = "yes" if stream.labelled else "no"
        sizes = stream.shards.bytes
        size = f"{int(sizes.sum()) / 1e6:.1f}" if sizes.all() else "unknown"
        table.add_row(Text(name), labels, str(stream.samples), str(len(stream.shards)), size)
    Console().print(table)
