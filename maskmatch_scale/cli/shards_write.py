"""`maskmatch shards write SOURCE`: a command for each data source. Nothing heavy is imported until one runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from maskmatch_scale.errors import UserError

if TYPE_CHECKING:
    from maskmatch_scale.data.shards.index import ShardIndex
    from maskmatch_scale.data.writing.sources.image_files import ImageFiles
    from maskmatch_scale.data.writing.sources.options import Options

shards_app = typer.Typer(help="Write and check shard folders.", no_args_is_help=True)


class _Sources(typer.core.TyperGroup):
    """The commands. A source that does not exist is a user's mistake like any other, told in one line."""

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
    from maskmatch_scale.data.writing import write_shards
    from maskmatch_scale.scores.source import ScoresSource

    pages = ScoresSource(
        seed=seed, labelled=labelled, unlabelled=unlabelled, dev=dev, val=val, val_font=val_font, size=size
    )
    print_index(write_shards(pages, out, workers=workers), out)


_LABELS, _SPLITS, _WRITING = "Label maps", "Splits", "Writing"


@dataclass(frozen=True)
class SharedOptions:
    """The options of every source of image files, a field each. The source gets those that `Options` has too."""

    classes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Class names in the order of their values, a line each, with `r g b` for RGB label maps; or YAML or "
            "JSON; or voc, cityscapes, ade20k, coco_stuff, coco.",
            rich_help_panel=_LABELS,
        ),
    ] = None
    id_map: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="YAML or JSON: raw label value → class value, class name or `ignore`.",
            rich_help_panel=_LABELS,
        ),
    ] = None
    unknown_as_ignore: Annotated[
        bool, typer.Option("--unknown-as-ignore", help="Ignore values that nothing names.", rich_help_panel=_LABELS)
    ] = False
    split_labelled: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Labelled samples, in UniMatch's format: `image label` a line, below the root.",
            rich_help_panel=_SPLITS,
        ),
    ] = None
    split_unlabelled: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Unlabelled ones, likewise; default: what remains of the training set.",
            rich_help_panel=_SPLITS,
        ),
    ] = None
    split_val: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Validation samples, likewise.", rich_help_panel=_SPLITS),
    ] = None
    dev: Annotated[
        str | None,
        typer.Option(
            metavar="N|SHARE",
            help="Labelled samples to hold out for choosing hyper-parameters: 100, or 0.1.",
            rich_help_panel=_SPLITS,
        ),
    ] = None
    split_seed: Annotated[int, typer.Option(help="Of samples that are held out.", rich_help_panel=_SPLITS)] = 0
    max_side: Annotated[
        int | None,
        typer.Option(min=1, metavar="PX", help="Shrink larger images to this side.", rich_help_panel=_WRITING),
    ] = None
    shuffle_seed: Annotated[
        int, typer.Option(help="Of the order of samples; -1 keeps that of the files.", rich_help_panel=_WRITING)
    ] = 0
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Write equal images more than once.", rich_help_panel=_WRITING)
    ] = False
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad", help="Leave bad samples out and list them; default: end.", rich_help_panel=_WRITING),
    ] = False
    samples_per_shard: Annotated[
        int, typer.Option(min=1, help="Most samples of a shard.", rich_help_panel=_WRITING)
    ] = 256
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; default: the cores.", rich_help_panel=_WRITING)
    ] = None

    def of_source(self, **others: Any) -> Options:
        """The options that the source needs, together with `others` that only this source has."""
        from maskmatch_scale.data.writing.sources.options import Options

        known = {field.name for field in fields(Options)}
        return Options(**{name: value for name, value in vars(self).items() if name in known}, **others)


_Val = Annotated[
    str | None,
    typer.Option(
        metavar="N|SHARE", help="Labelled samples to hold out for the final figures.", rich_help_panel=_SPLITS
    ),
]


def source_command(name: str, example: str) -> Callable[[Callable[..., ImageFiles]], Callable[..., ImageFiles]]:
    """Register a function that makes a source as the command that writes it.

    The command takes the function's parameters and OUT; the parameter `shared` is replaced by the options of
    :class:`SharedOptions`.
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
    images: Annotated[str | None, typer.Option(help="Of SOURCE: the images; default: images, or all of it.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="Of SOURCE: the label maps; default: labels, masks or annotations.")
    ] = None,
    label_suffix: Annotated[str, typer.Option(help="In place of an image's ending: its label map.")] = ".png",
    val: Annotated[
        str | None,
        typer.Option(
            metavar="N|SHARE|FOLDER",
            help="Labelled samples to hold out for the final figures; --dev and --val may name a folder of the images.",
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
        Path | None, typer.Option(metavar="DIR", help="What its paths are relative to; default: where FILE is.")
    ] = None,
    image_column: Annotated[str, typer.Option(help="Column with the image.")] = "image",
    label_column: Annotated[str, typer.Option(help="Column with the label map; may be empty or missing.")] = "label",
    stream_column: Annotated[
        str, typer.Option(help="Column with labelled, unlabelled, dev, val …; may be empty or missing.")
    ] = "stream",
    val: _Val = None,
) -> ImageFiles:
    """A list of images, as CSV or JSON lines."""
    from maskmatch_scale.data.writing.sources.image_list import image_list

    columns = {"image_column": image_column, "label_column": label_column, "stream_column": stream_column}
    return image_list(file, shared.of_source(val=val), root=root, **columns)


@source_command("voc", "VOCdevkit/VOC2012 data/voc --aug")
def _voc(
    root: Annotated[Path, typer.Argument(help="VOC2012.")],
    shared: SharedOptions,
    aug: Annotated[bool, typer.Option("--aug", help="Also the labels of SegmentationClassAug.")] = False,
    all_images: Annotated[
        bool, typer.Option("--all-images", help="The other images of JPEGImages are unlabelled.")
    ] = False,
) -> ImageFiles:
    """Pascal VOC 2012, 21 classes."""
    from maskmatch_scale.data.writing.sources.voc import voc

    return voc(root, shared.of_source(), aug=aug, all_images=all_images)


@source_command("cityscapes", "cityscapes data/cityscapes --train-extra")
def _cityscapes(
    root: Annotated[Path, typer.Argument(help="Folder of leftImg8bit and gtFine.")],
    shared: SharedOptions,
    train_extra: Annotated[
        bool, typer.Option("--train-extra", help="The images of leftImg8bit/train_extra are unlabelled.")
    ] = False,
) -> ImageFiles:
    """Cityscapes, 19 classes."""
    from maskmatch_scale.data.writing.sources.cityscapes import cityscapes

    return cityscapes(root, shared.of_source(), train_extra=train_extra)


@source_command("ade20k", "ADEChallengeData2016 data/ade20k --dev 500")
def _ade20k(
    root: Annotated[Path, typer.Argument(help="ADEChallengeData2016.")],
    shared: SharedOptions,
    converted: Annotated[
        bool, typer.Option("--converted", help="Label maps hold 0–149 and 255 already (UniMatch-V2's download).")
    ] = False,
) -> ImageFiles:
    """ADE20K's scene parsing challenge, 150 classes."""
    from maskmatch_scale.data.writing.sources.ade20k import ade20k

    return ade20k(root, shared.of_source(), converted=converted)


@source_command("coco-stuff", "coco data/coco-stuff --unlabeled2017")
def _coco_stuff(
    root: Annotated[Path, typer.Argument(help="Folder of images and stuffthingmaps.")],
    shared: SharedOptions,
    unlabeled2017: Annotated[
        bool, typer.Option("--unlabeled2017", help="The images of unlabeled2017 are unlabelled.")
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
    """A table of the streams of a folder."""
    table = Table(title=f"{root}: {len(index.classes)} classes")
    for column in ("stream", "labels", "samples", "shards", "MB"):
        table.add_column(column, justify="left" if column == "stream" else "right")
    for name, stream in index.streams.items():
        labels = "yes" if stream.labelled else "no"
        size = int(stream.shards.bytes.sum()) / 1e6
        table.add_row(name, labels, str(stream.samples), str(len(stream.shards)), f"{size:.1f}")
    Console().print(table)
