"""The sources of `maskmatch shards write SOURCE`, a command each. Large libraries are imported only when one runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskmatch_scale.cli.shards_write import (
    LABELS,
    SPLITS,
    OverwriteOption,
    PartOption,
    SharedOptions,
    print_index,
    print_warnings,
    source_command,
    write_app,
)

if TYPE_CHECKING:
    from maskmatch_scale.data.writing.sources.image_files import ImageFiles


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
    part: PartOption = None,
    overwrite: OverwriteOption = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: one for each core.")] = None,
) -> None:
    """Pages of real music, engraved and made to look like old scans, with exact labels."""
    from maskmatch_scale.data.writing import Part, write_shards
    from maskmatch_scale.scores.source import ScoresSource

    pages = ScoresSource(
        seed=seed, labelled=labelled, unlabelled=unlabelled, dev=dev, val=val, val_font=val_font, size=size
    )
    given = Part.parse(part) if part is not None else None
    index = write_shards(pages, out, workers=workers, part=given, overwrite=overwrite)
    print_index(index, out)
    print_warnings(index)


_Val = Annotated[
    str | None,
    typer.Option(
        metavar="N|SHARE", help="Labelled samples to hold out for the final evaluation.", rich_help_panel=SPLITS
    ),
]


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
            rich_help_panel=SPLITS,
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


_Background = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Class of the pixels that no annotation covers; `ignore`: they are ignored. Default: background.",
        rich_help_panel=LABELS,
    ),
]
_Unannotated = Annotated[
    str,
    typer.Option(
        metavar="background|unlabelled",
        help="What images are that the JSON names, but has no annotation of.",
        rich_help_panel=LABELS,
    ),
]


@source_command("coco", "street data/street --dev 0.1 --val 0.2")
def _coco(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="COCO JSON, or folder as CVAT, Roboflow or Label Studio export it.")
    ],
    shared: SharedOptions,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the images. Default: found by their names.")
    ] = None,
    panoptic: Annotated[
        bool, typer.Option("--panoptic", help="Of a folder, take panoptic_*.json, not instances_*.json.")
    ] = False,
    segments: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="PNGs of a panoptic JSON. Default: the folder beside it that has its name."),
    ] = None,
    background: _Background = None,
    others: Annotated[
        str,
        typer.Option(
            metavar="ignore|background",
            help="What annotations become whose category --classes leaves out.",
            rich_help_panel=LABELS,
        ),
    ] = "ignore",
    unannotated: _Unannotated = "background",
    crowds: Annotated[
        str | None,
        typer.Option(
            metavar="ignore|objects",
            help="What annotations with iscrowd become. Default: ignored, unless most have it.",
            rich_help_panel=LABELS,
        ),
    ] = None,
    val: _Val = None,
) -> ImageFiles:
    """COCO JSON, instances or panoptic; --classes chooses and orders categories by name."""
    from maskmatch_scale.data.writing.sources.coco import coco

    return coco(
        source,
        shared.of_source(val=val),
        images=images,
        panoptic=panoptic,
        segments=segments,
        background=background,
        others=others,
        unannotated=unannotated,
        crowds=crowds,
    )


@source_command("labelme", "scans data/scans --classes names.txt --dev 0.1 --val 0.2")
def _labelme(
    root: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of images with labelme's .json beside them.")],
    shared: SharedOptions,
    background: _Background = None,
    unannotated: _Unannotated = "background",
    val: _Val = None,
) -> ImageFiles:
    """A folder that was annotated with labelme: a .json beside an image."""
    from maskmatch_scale.data.writing.sources.labelme import labelme

    return labelme(root, shared.of_source(val=val), background=background, unannotated=unannotated)


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
