"""Pictures of held-out samples for the report: image, label and the predictions of all runs, embedded in the page."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from maskmatch_scale.errors import UserError
from maskmatch_scale.record.run_files import split_rank
from maskmatch_scale.record.run_folder import RunFolder

LONGEST_SIDE_PX = 768
"""Larger pictures are shrunk to this: about the height of a laptop's screen."""
MOST_SAMPLES = 4
"""Number of samples that are shown of one split."""
_FORMATS = ("PNG",)
"""What `maskmatch evaluate` writes. For some formats Pillow starts other programs, and a run may be a stranger's."""
PICTURE_BUDGET = 10 * 2**20
"""Largest number of characters of embedded pictures in a page. Further samples are left out, and the page says so."""


@dataclass(frozen=True)
class PictureRun:
    """A run whose pictures are shown."""

    path: Path
    name: str
    label: str
    """Short label of the run's method."""
    backbone: str
    mask_keep: float | None


@dataclass(frozen=True)
class Picture:
    """One picture with its caption."""

    title: str
    alt: str
    uri: str
    """The picture as a ``data:`` address."""
    is_label_map: bool
    """Whether it has flat colours, which the page enlarges without smoothing."""
    size_px: tuple[int, int]
    """Width and height of the file, before it was shrunk: a picture of a crop is smaller than the image."""


@dataclass(frozen=True)
class Predictions:
    """The predictions for a sample by the runs of one backbone."""

    backbone: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Sample:
    """One held-out sample."""

    name: str
    given: tuple[Picture, ...]
    """Image and label."""
    predictions: tuple[Predictions, ...]

    @property
    def size(self) -> int:
        """Number of characters of its pictures in the page."""
        shown = self.given + tuple(picture for group in self.predictions for picture in group.pictures)
        return sum(len(picture.uri) for picture in shown)


@dataclass(frozen=True)
class SplitPictures:
    """The samples of one split."""

    split: str
    legend: tuple[tuple[str, str], ...]
    """Class names with their CSS colours."""
    samples: tuple[Sample, ...]
    left_out: int
    """Number of samples that some run has pictures of, but that the page does not show."""


def held_out_pictures(runs: Sequence[PictureRun]) -> tuple[SplitPictures, ...]:
    """The pictures of every split that any run has; splits in the order of :func:`split_rank`.

    Folders with the same name in several runs are the same sample, whose image and label are embedded once. Files that
    are missing or incomplete are left out.

    Raises:
        UserError: a file `classes.json` cannot be read; the message names it.
    """
    found = sorted(
        {folder.name for run in runs for folder in _folders(RunFolder(run.path).all_pictures)}, key=split_rank
    )
    budget = PICTURE_BUDGET
    splits = []
    for split in found:
        names = sorted({folder.name for run in runs for folder in _folders(RunFolder(run.path).pictures(split))})
        samples: list[Sample] = []
        for name in names[:MOST_SAMPLES]:
            sample = _sample(runs, split, name)
            budget -= sample.size
            if budget < 0:
                break
            samples.append(sample)
        if names:
            splits.append(SplitPictures(split, _legend(runs, split), tuple(samples), len(names) - len(samples)))
    return tuple(splits)


def _folders(path: Path) -> list[Path]:
    """Folders in one; not the hidden one of an evaluation that goes on or was killed."""
    if not path.is_dir():
        return []
    return [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _sample(runs: Sequence[PictureRun], split: str, name: str) -> Sample:
    folders = [RunFolder(run.path).pictures(split) / name for run in runs]
    given = (
        _first(folders, "image.png", "Image", f"{name}: image", is_label_map=False),
        _first(folders, "label.png", "Label", f"{name}: label map", is_label_map=True),
    )
    groups = []
    for backbone in dict.fromkeys(run.backbone for run in runs):
        pairs = [(run, folder) for run, folder in zip(runs, folders) if run.backbone == backbone]
        # The predictions of whole images come first, so that they are beside each other.
        pictures = [_prediction(run, folder, name) for run, folder in pairs]
        for run, folder in pairs:
            pictures += _masked(run, folder, name)
        groups.append(Predictions(backbone, tuple(filter(None, pictures))))
    return Sample(name, tuple(filter(None, given)), tuple(groups))


def _first(folders: Sequence[Path], file: str, title: str, alt: str, *, is_label_map: bool) -> Picture | None:
    return next(
        filter(None, (_picture(folder / file, title, alt, is_label_map=is_label_map) for folder in folders)), None
    )


def _prediction(run: PictureRun, folder: Path, name: str) -> Picture | None:
    """The teacher's prediction. If there is none, the student's, with a title that says so."""
    alt = f"{name}: prediction of {run.name}"
    return _picture(folder / "prediction-ema.png", run.label, alt, is_label_map=True) or _picture(
        folder / "prediction-student.png", f"{run.label}, student", f"{alt}, student", is_label_map=True
    )


def _masked(run: PictureRun, folder: Path, name: str) -> Iterator[Picture | None]:
    """The visible units, and the prediction made from them alone."""
    kept = "" if run.mask_keep is None else f" ({run.mask_keep:.0%})"
    # Masks are drawn for a training crop, which may be smaller than the image beside it.
    crop = " of one crop" if _size(folder / "visible.png") != _size(folder / "image.png") else ""
    yield _picture(
        folder / "visible.png",
        f"{run.label}: visible units{kept}{crop}",
        f"{name}: units visible to {run.name}",
        is_label_map=False,
    )
    yield _picture(
        folder / "prediction-visible.png",
        f"{run.label}: prediction from these alone",
        f"{name}: prediction of {run.name} from the visible units alone",
        is_label_map=True,
    )


def _size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path, formats=_FORMATS) as image:
            return image.size
    except OSError:
        return None


def _picture(path: Path, title: str, alt: str, *, is_label_map: bool) -> Picture | None:
    try:
        uri = _label_map_uri(path) if is_label_map else _photo_uri(path)
    except OSError:
        return None
    size_px = _size(path)
    return None if size_px is None else Picture(title, alt, uri, is_label_map, size_px)


def _label_map_uri(path: Path) -> str:
    """A lossless PNG, shrunk without interpolation, which would mix the colours of two classes into a third one."""
    with Image.open(path, formats=_FORMATS) as image:
        packed = io.BytesIO()
        _shrunk(image, Image.Resampling.NEAREST).save(packed, "PNG", optimize=True)
    return _uri("image/png", packed.getvalue())


def _photo_uri(path: Path) -> str:
    with Image.open(path, formats=_FORMATS) as image:
        packed = io.BytesIO()
        plain = image.convert("L" if image.mode == "L" else "RGB")
        _shrunk(plain, Image.Resampling.LANCZOS).save(packed, "JPEG", quality=82, optimize=True)
    return _uri("image/jpeg", packed.getvalue())


def _shrunk(image: Image.Image, resampling: Image.Resampling) -> Image.Image:
    factor = LONGEST_SIDE_PX / max(image.size)
    if factor >= 1:
        return image
    return image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))), resampling)


def _uri(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def _legend(runs: Sequence[PictureRun], split: str) -> tuple[tuple[str, str], ...]:
    for run in runs:
        path = RunFolder(run.path).pictures(split) / "classes.json"
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                colours = [(int(red), int(green), int(blue)) for red, green, blue in content["palette"]]
                return tuple((str(name), f"rgb({r} {g} {b})") for name, (r, g, b) in zip(content["classes"], colours))
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}: classes and palette cannot be read from it: {error}") from None
    return ()
