"""What a mean over all pixels does not show: boundaries, small objects, masked units; and calibration of pseudo-labels.

Every image is predicted once as the scores are, once for each share of visible units, and once as the teacher makes
pseudo-labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from maskmatch_scale.data.batches.held_out import evaluation_samples
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.evaluation.boundary import BoundaryIou, NearBoundary
from maskmatch_scale.evaluation.calibration import Reliability
from maskmatch_scale.evaluation.inference import Inference
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.evaluation.objects import SmallObjects
from maskmatch_scale.evaluation.windows import window_starts
from maskmatch_scale.models.segmenter import Segmenter
from maskmatch_scale.models.units import sample_visible
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.seeds import generator

NEAR_PX = (1, 3, 5, 10)
"""Distances from a boundary."""
VISIBLE_SHARES = (0.1, 0.3, 0.5, 0.7, 1.0)
"""Shares of the units that are visible."""


Part = tuple[slice, slice]
"""Rows and columns."""


class Masked:
    """A segmenter that sees a share of the units of each window; they are drawn from a seed and the number of the call.

    Args:
        segmenter: in eval mode.
        share: of the units, 0–1; at least one unit is visible.
        mode: `drop` or `zero`.
        seed: of the run.
    """

    def __init__(self, segmenter: Segmenter, share: float, mode: str, seed: int) -> None:
        self.segmenter, self.share, self.mode, self.seed = segmenter, share, mode, seed
        self.calls = 0

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of images (B, C, h, w), normalised, h and w whole units."""
        grid = self.segmenter.unit_grid(images.shape[2], images.shape[3])
        count = max(1, round(self.share * grid[0] * grid[1]))
        draw = generator(self.seed, "visible share", f"{self.share:g}", self.calls)
        self.calls += 1
        visible = sample_visible(len(images), grid, count, draw).to(images.device)
        logits: Tensor = self.segmenter(images, visible, self.mode)
        return logits


def measure_locality(
    segmenter: Segmenter,
    recipe: Recipe,
    split: str,
    inference: Inference,
    thresholds: float | tuple[float, ...],
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure a segmenter on a labelled split, in one process.

    Args:
        segmenter: in eval mode, on the device of ``inference``.
        recipe: of the run: data, training crop, mode of the masks, scales of the pseudo-labels, seed.
        split: stream name.
        inference: how images are predicted for the scores.
        thresholds: of pseudo-labels: τ of all classes, or of each class of the segmenter.
        progress: called after every image.

    Returns:
        Figures from 0 to 1; None where nothing was counted:
        `boundary_iou` (mean over classes) and `boundary_iou_by_class`;
        `miou_near_boundary`, by distance in px;
        `small_object_recall` (mean over classes that have any), `small_objects` (their number);
        `miou_visible`, by share of visible units in windows of the training crop; not if these are not whole units;
        `pseudo_labels`: those of the scales `method.scales`, of each window of the training crop by itself, with
        `method.teacher_margin_px` around it, as the teacher makes them; where windows overlap, those of the first one:
        `expected_error`, `coverage` and `accuracy` of those at the threshold, and a `table` by confidence.
    """
    data, method, classes = recipe.data, recipe.method, segmenter.num_classes
    index = load_index(data.root, data)
    crop = recipe.evaluation.model_copy(update={"mode": "sliding", "scales": (1.0,), "flip": False})
    on_crops = replace(inference, recipe=crop, window_px=data.crop_px)
    margin, (height, width) = method.teacher_margin_px, data.crop_px
    as_teacher = replace(
        on_crops,
        recipe=crop.model_copy(update={"scales": method.scales}),
        window_px=(height + 2 * margin, width + 2 * margin),
    )
    boundary = BoundaryIou(classes, index.ignore_index)
    near = NearBoundary(classes, NEAR_PX, index.ignore_index)
    small = SmallObjects(classes, index.ignore_index)
    labels = Reliability(thresholds, index.ignore_index)
    masked: dict[float, tuple[Masked, ConfusionMatrix]] = {}
    if all(side % segmenter.unit_px == 0 for side in data.crop_px):
        for share in VISIBLE_SHARES:
            seeing = Masked(segmenter, share, method.mask.mode, recipe.run.seed)
            masked[share] = seeing, ConfusionMatrix(classes, index.ignore_index)
    with closing(evaluation_samples(data, split, workers=data.workers)) as samples:
        for sample in samples:
            predicted = inference.predict(segmenter, sample.image)
            for measure in (boundary, near, small):
                measure.update(predicted, sample.label)
            for seeing, matrix in masked.values():
                matrix.update(on_crops.predict(seeing, sample.image), sample.label)
            around = F.pad(sample.image, (margin,) * 4)
            for window, own in _crops(sample.label.shape, data.crop_px):
                seen = [slice(part.start, part.stop + 2 * margin) for part in window]
                label = sample.label[window]
                inner = tuple(slice(margin, margin + side) for side in label.shape)
                pseudo, confidence = as_teacher.predict_confidently(segmenter, around[:, seen[0], seen[1]])
                labels.update(confidence[inner][own], pseudo[inner][own], label[own])
            progress()
    pixels, right = labels.above.tolist()
    return {
        "boundary_iou": _mean(boundary.iou()),
        "boundary_iou_by_class": dict(zip(index.classes, map(_number, boundary.iou().tolist()), strict=False)),
        "miou_near_boundary": {str(px): _number(matrix.miou()) for px, matrix in near.matrices.items()},
        "small_object_recall": _mean(small.recall()),
        "small_objects": int(small.counts[0].sum()),
        "miou_visible": {f"{share:g}": _number(matrix.miou()) for share, (_, matrix) in masked.items()},
        "pseudo_labels": {
            "expected_error": _number(labels.expected_error()),
            "threshold": method.threshold,
            "coverage": _number(pixels / max(1.0, float(labels.counts[0].sum()))),
            "accuracy": right / pixels if pixels else None,
            "table": labels.table(),
        },
    }


def _crops(size_px: Sequence[int], crop_px: tuple[int, int]) -> Iterator[tuple[Part, Part]]:
    """Windows that cover an image, and within each the part that no window before it covers: each pixel is in one."""
    rows, columns = (_sides(side, crop) for side, crop in zip(size_px, crop_px, strict=True))
    for (high, own_rows), (wide, own_columns) in product(rows, columns):
        yield (high, wide), (own_rows, own_columns)


def _sides(side: int, crop: int) -> list[tuple[slice, slice]]:
    starts = window_starts(side, crop, 0.0)
    ends = [0, *(start + crop for start in starts)]
    return [(slice(start, start + crop), slice(end - start, None)) for start, end in zip(starts, ends)]


def _mean(values: Tensor) -> float | None:
    return _number(float(values.nanmean()))


def _number(value: float) -> float | None:
    return None if value != value else value
