"""Evaluation of the teacher within a run: scores on held-out splits, and pseudo-labels on training images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from maskmatch_scale.data.batches.held_out import EvaluationSample, evaluation_samples
from maskmatch_scale.data.batches.sources import draw_labelled
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.evaluation.boundary import BoundaryIou
from maskmatch_scale.evaluation.calibration import Reliability
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.method.pseudo_labels import multi_scale_pseudo_labels
from maskmatch_scale.runs.evaluate import inference_of
from maskmatch_scale.training.run import Run


class Interrupted(Exception):  # noqa: N818 - no error: the run has been asked to stop
    """An evaluation was broken off."""


@contextmanager
def _as_trained(run: Run) -> Iterator[None]:
    """The run's own arithmetic, and its teacher whole."""
    with torch.no_grad(), run.engine.arithmetic(), run.teacher.gathered():
        yield


def _samples(run: Run, split: str, numbers: Sequence[int]) -> Iterator[EvaluationSample]:
    """Samples of a split, in this process.

    Raises:
        Interrupted: the run is to stop.
    """
    with closing(evaluation_samples(run.recipe.data, split, numbers=numbers)) as samples:
        for sample in samples:
            if run.agreement.wanted is not None:
                raise Interrupted
            yield sample


def evenly(count: int, most: int | None) -> list[int]:
    """Numbers below ``count``, at most ``most`` of them, evenly spaced."""
    if most is None or most >= count:
        return list(range(count))
    return [number * count // most for number in range(most)]


def score(run: Run, split: str, images: int | None, *, boundaries: bool) -> dict[str, Any]:
    """Scores of the teacher, predicted as evaluations of the recipe are.

    Args:
        run: of which the teacher is taken; nothing of it is changed.
        split: stream name.
        images: how many images are taken, evenly spaced; None: all.
        boundaries: whether boundary IoU and IoU by class are wanted too.

    Returns:
        `images`, `miou`, `pixel_accuracy`; with ``boundaries`` also `boundary_iou` and `iou` by class (None: the class
        does not occur). All from 0 to 1.
    """
    index, classes = load_index(run.recipe.data.root), run.student.num_classes
    matrix = ConfusionMatrix(classes, index.ignore_index)
    device = run.runtime.device
    near = BoundaryIou(classes, index.ignore_index)
    near.counts = near.counts.to(device)
    inference = inference_of(run.recipe, run.student, device)
    numbers = evenly(index.stream(split).samples, images)
    with _as_trained(run):
        for sample in _samples(run, split, numbers):
            predicted = inference.predict(run.teacher, sample.image)
            matrix.update(predicted, sample.label)
            if boundaries:
                near.update(predicted.to(device), sample.label.to(device))
    found: dict[str, Any] = {"images": len(numbers), "miou": matrix.miou(), "pixel_accuracy": matrix.pixel_accuracy()}
    if boundaries:
        found["boundary_iou"] = float(near.iou().nanmean())
        found["iou"] = dict(zip(index.classes, map(_known, matrix.iou().tolist()), strict=False))
    return found


def check_pseudo_labels(run: Run, most: int) -> dict[str, float | int | None]:
    """How many pseudo-labels count, and how many of these are right, on labelled images that this draw left out.

    They are made as in training, on crops, with the margin that the teacher sees: those that fit into an image side by
    side.

    Args:
        run: of which the teacher is taken.
        most: images at most, evenly spaced.

    Returns:
        `coverage`: share of the pixels with confidence ≥ τ; `accuracy`: share of these with the right class; None where
        nothing was counted; `images`.
    """
    recipe = run.recipe
    index = load_index(recipe.data.root)
    (drawn,) = draw_labelled([index.stream("labelled").samples], recipe.data.labelled_count, recipe.data.split_seed)
    used = set(range(index.stream("labelled").samples) if drawn is None else drawn.tolist())
    others = [number for number in range(index.stream("labelled").samples) if number not in used]
    numbers = [others[number] for number in evenly(len(others), most)]
    threshold, scales = run.maskmatch.threshold, run.maskmatch.recipe.scales  # which a variant may change
    if isinstance(threshold, torch.Tensor):
        threshold = threshold.tolist()
    counted = Reliability(threshold, index.ignore_index)
    inference = inference_of(recipe, run.student, run.runtime.device)
    with _as_trained(run):
        for sample in _samples(run, "labelled", numbers):
            margin = recipe.method.teacher_margin_px
            images = inference.normalise(F.pad(sample.image, (margin,) * 4))
            for rows, columns in _tiles(sample.label.shape, recipe.data.crop_px):
                height, width = (part.stop + 2 * margin for part in (rows, columns))
                views = images[None, :, rows.start : height, columns.start : width]
                labels, confidence = multi_scale_pseudo_labels(run.teacher, views, scales, margin)
                counted.update(confidence[0].cpu(), labels[0].cpu(), sample.label[rows, columns])
    pixels, right = counted.above.tolist()
    total = float(counted.counts[0].sum())
    return {
        "images": len(numbers),
        "coverage": pixels / total if total else None,
        "accuracy": right / pixels if pixels else None,
    }


def _tiles(size_px: Sequence[int], crop_px: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Crops side by side that lie within an image."""
    height, width = crop_px
    for top in range(0, size_px[0] - height + 1, height):
        for left in range(0, size_px[1] - width + 1, width):
            yield slice(top, top + height), slice(left, left + width)


def _known(value: float) -> float | None:
    return None if value != value else value
