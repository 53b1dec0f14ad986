"""Adds ONNX graphs to an export, with what is known of them in `onnx.json` and in the model card.

    OUT/
      model.onnx            one image a call, of one size
      model-batch.onnx      the same for batches of any number; only if it gives the same
      onnx.json             size, normalisation, opset, and how far the graphs are from torch
      model.onnx.data, …    the weights, if there are more than 1.5 GB of them

Decision: docs/decisions/0059-onnx-of-one-size.md.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.errors import CommandFailed, UserError
from maskmatch_scale.evaluation.inference import window_of
from maskmatch_scale.export.graph.check import Difference, compare
from maskmatch_scale.export.graph.tiles import Tiles, given_tiles, held_out_tiles, noise_tiles
from maskmatch_scale.export.graph.write import INPUT, LIBRARIES, OPSET, OUTPUT, write_graph
from maskmatch_scale.export.load import load_export
from maskmatch_scale.export.markdown import plain, string, with_section
from maskmatch_scale.extras import require
from maskmatch_scale.files import write_whole
from maskmatch_scale.models import Segmenter
from maskmatch_scale.runs.data import read_run_data, recipe_of, with_bands
from maskmatch_scale.runs.evaluate import window_px
from maskmatch_scale.runs.model import build_student

GRAPH, BATCH_GRAPH, FACTS = "model.onnx", "model-batch.onnx", "onnx.json"
SECTION = "## ONNX"


@dataclass(frozen=True)
class Plan:
    """What is to be exported, and what it is checked on; known before anything is written."""

    size_px: tuple[int, int]
    """Height and width of images."""
    tiles: Tiles


def plan_for_run(run: Path, size_px: tuple[int, int] | None, images: Sequence[Path]) -> Plan:
    """Size and tiles for the model of a run.

    Args:
        run: run directory.
        size_px: height and width; None: the window of its evaluations.
        images: files and folders to check it on; if none are given, held-out images of the run's data, or noise if
            these are not at hand.

    Raises:
        UserError: a library is missing, the model does not take this size, or an image cannot be read.
    """
    require(LIBRARIES, "onnx", "--onnx")
    data = read_run_data(run)
    recipe = with_bands(recipe_of(run), data)
    with torch.device("meta"):
        segmenter = build_student(recipe, data, pretrained=False)
    size_px = _checked(size_px, segmenter) if size_px else window_px(recipe, segmenter)
    if images:
        return Plan(size_px, given_tiles(images, size_px, data.bands))
    try:
        return Plan(size_px, held_out_tiles(recipe.data, size_px))
    except DataError as error:
        return Plan(
            size_px, noise_tiles(segmenter.in_channels, size_px, f"data.root of the run cannot be read: {error}")
        )


def plan_for_export(folder: Path, size_px: tuple[int, int] | None, images: Sequence[Path]) -> Plan:
    """Size and tiles for an export: the window of its evaluations, and noise, unless others are given.

    Raises:
        UserError: as :func:`plan_for_run`.
    """
    require(LIBRARIES, "onnx", "--onnx")
    segmenter = load_export(folder)
    description = segmenter.description
    size_px = (
        _checked(size_px, segmenter)
        if size_px
        else window_of(description.evaluation, description.image_size, segmenter)
    )
    if images:
        return Plan(size_px, given_tiles(images, size_px, description.bands))
    return Plan(
        size_px, noise_tiles(segmenter.in_channels, size_px, "an export has no data; name images with --onnx-images")
    )


def _checked(size_px: tuple[int, int], segmenter: Segmenter) -> tuple[int, int]:
    unit = segmenter.unit_px
    try:
        segmenter.check_size(*size_px)
        if min(size_px) < unit:
            raise ValueError(f"images must be at least a unit of {unit} px high and wide")
    except ValueError as error:
        raise UserError(f"--onnx-size {size_px[0]} {size_px[1]}: {error}") from None
    return size_px


def add_onnx(folder: Path, plan: Plan) -> list[str]:
    """Add graphs to an export. All else in the folder stays as it was, also if they cannot be made.

    Args:
        folder: an export. Graphs of before are replaced.
        plan: of it.

    Returns:
        Lines for the user: what was compared, and how far apart it is.

    Raises:
        CommandFailed: the graph of one image cannot be made, or differs from torch. Nothing of it is left.
        OSError: a file cannot be written.
    """
    segmenter, fixed = load_export(folder), load_export(folder)
    fixed.encoder.fix_size(*plan.size_px)
    tiles = plan.tiles.normalised(segmenter.mean, segmenter.std)
    lines = [f"{GRAPH}: checked on {plan.tiles.source}"]
    with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as name:
        written = Path(name)
        write_graph(fixed, written / GRAPH, plan.size_px, any_batch=False)
        one = compare(segmenter, written / GRAPH, tiles)
        if not one.is_rounding:
            raise CommandFailed(
                f"{folder}: {GRAPH} is not kept, because onnxruntime and torch differ on {plan.tiles.source}: "
                f"{one.in_words()}; the rest of the export is complete"
            )
        lines.append(f"{GRAPH}: {one.in_words()}")
        several, line = _any_batch(segmenter, fixed, written, plan, tiles)
        lines.append(line)
        facts = _facts(segmenter, plan, one, several)
        for old in (GRAPH, BATCH_GRAPH, f"{GRAPH}.data", f"{BATCH_GRAPH}.data"):
            (folder / old).unlink(missing_ok=True)
        for file in sorted(written.iterdir(), reverse=True):  # weights before the graph that names them
            file.chmod((folder / "segmenter.json").stat().st_mode)
            shutil.move(file, folder / file.name)
    write_whole(folder / FACTS, json.dumps(facts, indent=1))
    card = folder / "README.md"
    if card.is_file():
        write_whole(
            card,
            with_section(card.read_text(), SECTION, _section(folder.resolve().name, facts, one), before="## Not known"),
        )
    return lines


def _any_batch(
    segmenter: Segmenter, fixed: Segmenter, folder: Path, plan: Plan, tiles: list[torch.Tensor]
) -> tuple[Difference | None, str]:
    """Write the graph of any batch if it gives what torch gives; else None, with a line that says why."""
    try:
        write_graph(fixed, folder / BATCH_GRAPH, plan.size_px, any_batch=True)
        # Batches of three, of what is left, and of one.
        found = [compare(segmenter, folder / BATCH_GRAPH, tiles, batch) for batch in (3, 1)]
        worst = max(found, key=lambda difference: difference.logits)
        if all(difference.is_rounding for difference in found):
            return worst, f"{BATCH_GRAPH}: {worst.in_words()}"
        reason = worst.in_words()
    except CommandFailed as error:
        reason = str(error)
    except Exception as error:  # onnxruntime's own classes, for a graph that it cannot run
        reason = str(error).splitlines()[0]
    for file in folder.glob(f"{BATCH_GRAPH}*"):
        file.unlink()
    return None, f"{BATCH_GRAPH} is left out: {reason}"


def _facts(segmenter: Segmenter, plan: Plan, one: Difference, several: Difference | None) -> dict[str, Any]:
    height, width = plan.size_px
    files = {GRAPH: one} if several is None else {GRAPH: one, BATCH_GRAPH: several}
    return {
        "format": 1,
        "input": {"name": INPUT, "dtype": "float32", "shape": ["batch", segmenter.in_channels, height, width]},
        **({} if segmenter.sees_colours else {"channels": list(segmenter.channels)}),
        "output": {"name": OUTPUT, "dtype": "float32"},
        "mean": segmenter.mean,
        "std": segmenter.std,
        "opset": OPSET,
        "checked_on": plan.tiles.source,
        "difference_from_torch": {name: difference.as_json() for name, difference in files.items()},
        "versions": {name: version(name) for name in ("torch", *LIBRARIES)},
    }


def _section(name: str, facts: dict[str, Any], one: Difference) -> str:
    _, channels, height, width = facts["input"]["shape"]
    shape = f"float32 (1, {channels}, {height}, {width})"
    colours = "RGB in 0–1" if "channels" not in facts else f"{', '.join(map(plain, facts['channels']))} in 0–1"
    mean, std = (", ".join(f"{value:g}" for value in facts[key]) for key in ("mean", "std"))
    batches = BATCH_GRAPH in facts["difference_from_torch"]
    more = f" `{BATCH_GRAPH}` takes any number of images a call." if batches else ""
    return f"""`{GRAPH}` takes one image of {height}×{width} px a call: `{INPUT}`, {shape},
{colours}, minus the mean ({mean}), divided by the standard deviation ({std}); this is not part of the graph. It gives
`{OUTPUT}`, float32 (1, classes, h, w), which may be coarser than the image: upsample them bilinearly.{more} Opset
{facts["opset"]}. Compared with torch by onnxruntime {facts["versions"]["onnxruntime"]} on a CPU, on
{facts["checked_on"]}: {one.in_words()}.

```python
import onnxruntime

session = onnxruntime.InferenceSession({string(f"{name}/{GRAPH}")})
logits = session.run(None, {{"{INPUT}": images}})[0]  # images: numpy, float32
```"""
