"""Over which classes a mean IoU is a mean: one over a single class says little, and looks like a perfect one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from maskmatch_scale.data.shards.label_pixels import named
from maskmatch_scale.evaluation.miou import ConfusionMatrix


def scored_classes(matrix: ConfusionMatrix, classes: Sequence[str]) -> dict[str, Any]:
    """Fields of the record of an evaluation.

    Args:
        matrix: with the counts of all ranks.
        classes: names; further classes of the matrix are called by their numbers.

    Returns:
        `classes`: their number. `classes_in_mean`: of how many of them the mean IoU is the mean: those that labels or
        predictions contain. `classes_without_pixels`: names of those that no label contains.
    """
    names = [*classes, *(f"class {number}" for number in range(len(classes), matrix.num_classes))]
    without = (matrix.counts.sum(1) == 0).tolist()
    return {
        "classes": matrix.num_classes,
        "classes_in_mean": int((~matrix.iou().isnan()).sum()),
        "classes_without_pixels": [name for name, is_without in zip(names, without, strict=False) if is_without],
    }


def mean_warnings(record: Mapping[str, Any]) -> list[str]:
    """What should be known of a mean IoU, a line each; none if labels contain all classes.

    Args:
        record: with `split` and what :func:`scored_classes` returns.
    """
    lines, without = [], record["classes_without_pixels"]
    if without:
        which = "their IoU says" if len(without) > 1 else "its IoU says"
        lines.append(f"{record['split']}: no pixel of {named(without)}; {which} nothing")
    if record["classes_in_mean"] == 1:
        lines.append(f"{record['split']}: labels and predictions have one class alone; its mean IoU of 1 says nothing")
    return lines
