"""The picture at the top of the README: what a trained run makes of a page of music that it has never seen.

    make quickstart
    python -m benchmarks.picture --run runs/quickstart/segformer-maskmatch --out docs/picture.png

The music was written for this picture (`_musicxml`), so that the page may be passed on with the repository; the
quickstart's own pages may not (docs/data.md). It is engraved and aged like those.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness import say
from maskmatch_scale.evaluation.inference import Inference
from maskmatch_scale.models import Segmenter
from maskmatch_scale.models.units import sample_visible, visible_count, visible_pixel_mask
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.runs.evaluate import inference_of
from maskmatch_scale.runs.model import open_run
from maskmatch_scale.scores.ageing import MARGIN, age, bend
from maskmatch_scale.scores.engraving import CLASSES, Style, downsample, engrave
from maskmatch_scale.scores.source import PALETTE
from maskmatch_scale.seeds import generator

FONT = "Leland"
"""One of the fonts of the unlabelled pages; labelled pages are in Leipzig."""
SIDE_PX = 512
SEED = 1

_STEPS = "CDEFGAB"


def _note(height: int, duration: int, extra: str = "", *, chord: bool = False, notations: str = "") -> str:
    """A MusicXML note: its height in steps above C0, its duration in eighths."""
    kind = {1: "eighth", 2: "quarter", 4: "half", 8: "whole"}[duration]
    pitch = f"<pitch><step>{_STEPS[height % 7]}</step><octave>{height // 7}</octave></pitch>"
    return (
        f"<note>{'<chord/>' if chord else ''}{pitch}<duration>{duration}</duration><type>{kind}</type>{extra}"
        f"{f'<notations>{notations}</notations>' if notations else ''}</note>"
    )


def _rest(duration: int) -> str:
    kind = {1: "eighth", 2: "quarter", 4: "half"}[duration]
    return f"<note><rest/><duration>{duration}</duration><type>{kind}</type></note>"


def _treble(measure: int) -> str:
    """Eight eighths: a rising figure, a held chord, or a phrase with rests and an accidental."""
    low = 35 + (3 * measure) % 5
    if measure % 3 == 0:
        eighths = "".join(
            _note(low + step, 1, f"<beam number='1'>{'begin' if step % 2 == 0 else 'end'}</beam>") for step in range(4)
        )
        return (
            eighths
            + _note(low + 4, 2, notations="<slur type='start' number='1'/>")
            + _note(low + 2, 2, notations="<slur type='stop' number='1'/>")
        )
    if measure % 3 == 1:
        return _note(low, 4) + _note(low + 2, 4, chord=True) + _rest(2) + _note(low + 5, 2)
    sharp = "<accidental>sharp</accidental>"
    return _note(low + 6, 2, sharp) + _rest(1) + _note(low + 4, 1) + _note(low + 3, 2) + _rest(2)


def _bass(measure: int) -> str:
    low = 21 + (2 * measure) % 6
    if measure % 4 == 3:
        return _note(low, 8)
    return _note(low, 4) + _note(low + 4, 4, chord=True) + _note(low + 2, 2) + _note(low + 1, 2)


def _musicxml(measures: int = 24) -> str:
    """A study for two staves, in D major."""
    parts = []
    for name, voice, clef in (
        ("P1", _treble, "<sign>G</sign><line>2</line>"),
        ("P2", _bass, "<sign>F</sign><line>4</line>"),
    ):
        start = (
            f"<attributes><divisions>2</divisions><key><fifths>2</fifths></key><time><beats>4</beats><beat-type>4"
            f"</beat-type></time><clef>{clef}</clef></attributes>"
        )
        bars = "".join(
            f"<measure number='{n + 1}'>{start if n == 0 else ''}{voice(n)}</measure>" for n in range(measures)
        )
        parts.append(f"<part id='{name}'>{bars}</part>")
    listed = "".join(f"<score-part id='{name}'><part-name/></score-part>" for name in ("P1", "P2"))
    return f"<score-partwise version='4.0'><part-list>{listed}</part-list>{''.join(parts)}</score-partwise>"


def draw_page() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The page and its label map: uint8 (SIDE_PX, SIDE_PX, 3) and (SIDE_PX, SIDE_PX)."""
    rng = np.random.default_rng(SEED)
    sheet = engrave(_musicxml(), Style(FONT, 9.0, 0.22, 0.25, 0.38, 7, 0.25), SIDE_PX)
    points = bend(sheet.raster(0, SIDE_PX, MARGIN), SIDE_PX, MARGIN, rng)
    ink, label = downsample(points)
    verso = downsample(sheet.raster(max(0, sheet.height - SIDE_PX), SIDE_PX))[0]
    grey = age(ink, verso, rng)
    return np.repeat(grey[..., None], 3, axis=2), label


def panels(run: Path) -> list[tuple[str, NDArray[np.uint8]]]:
    """Titles and RGB pictures, uint8 (SIDE_PX, SIDE_PX, 3)."""
    palette = np.array(PALETTE, np.uint8)
    page, label = draw_page()
    recipe, teacher, _ = open_run(run, "ema")
    _, student, _ = open_run(run, "student")
    inference = inference_of(recipe, teacher, torch.device("cpu"))
    image = torch.from_numpy(page.transpose(2, 0, 1).copy())
    seen, guessed = _masked(recipe, student, inference, image)
    return [
        ("a page in a font without labels", page),
        ("its labels, never seen in training", palette[label]),
        ("prediction of the teacher", palette[inference.predict(teacher, image).numpy()]),
        (f"what the masked view shows, {recipe.method.mask.keep:.0%}", seen),
        ("prediction of the student from that alone", palette[guessed]),
    ]


@torch.no_grad()
def _masked(
    recipe: Recipe, student: Segmenter, inference: Inference, image: torch.Tensor
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The page with masked units grey, and the student's classes from the visible ones, crop by crop."""
    assert recipe.method.mask.keep is not None
    rows, columns = recipe.data.crop_px
    seen = image.permute(1, 2, 0).numpy().copy()
    classes = np.zeros(seen.shape[:2], np.int64)
    grid = student.unit_grid(rows, columns)
    count = visible_count(grid, recipe.method.mask.keep)
    for top in range(0, SIDE_PX, rows):
        for left in range(0, SIDE_PX, columns):
            crop = (slice(top, top + rows), slice(left, left + columns))
            visible = sample_visible(1, grid, count, generator(SEED, "picture", top, left))
            kept = visible_pixel_mask(visible, grid, student.unit_px)[0].numpy()
            seen[crop][~kept] = 128
            logits = student(inference.normalise(image[:, crop[0], crop[1]])[None], visible, recipe.method.mask.mode)
            scores = torch.nn.functional.interpolate(logits, size=(rows, columns), mode="bilinear")
            classes[crop] = scores.argmax(1)[0].numpy()
    return seen, classes


def draw(shown: Sequence[tuple[str, NDArray[np.uint8]]], out: Path) -> None:
    """All panels and the colours of the classes, as one PNG."""
    figure, axes = plt.subplots(2, 3, figsize=(10.8, 7.6))
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.96, wspace=0.03, hspace=0.09)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (title, picture) in zip(axes.flat, shown):
        axis.imshow(picture, interpolation="antialiased")
        axis.set_title(title, fontsize=10)
    colours = [
        Patch(facecolor=np.array(colour) / 255, edgecolor="black", linewidth=0.4, label=name.replace("_", " "))
        for name, colour in zip(CLASSES, PALETTE, strict=True)
    ]
    axes.flat[-1].legend(handles=colours, loc="center", frameon=False, fontsize=10, ncols=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
            out, optimize=True
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the picture of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = Path("runs/quickstart/segformer-maskmatch")
    parser.add_argument("--run", type=Path, default=run, help="a run of the quickstart with a mask")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    options = parser.parse_args(arguments)
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        draw(panels(options.run), options.out)
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        sys.exit(2)


if __name__ == "__main__":
    main()
