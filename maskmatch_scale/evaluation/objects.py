"""Recall of small objects: connected pixels of one class in the label."""

from __future__ import annotations

import torch
from torch import Tensor

SMALL_PX = 32 * 32
"""Objects with less pixels are small: COCO's bound."""


def components(classes: Tensor) -> tuple[Tensor, Tensor]:
    """Number the connected components of a label map.

    Rows are cut into runs of one class, and the runs are joined: on real labels these are few. About 32 bytes a pixel
    are in memory, 65 if every pixel is drawn by itself.

    Args:
        classes: integer (H, W), less than 2³¹ pixels.

    Returns:
        The number of each pixel's component, int32 (H, W), from 0 in the order of their first pixels: it is the same
        where a path of neighbours (8 a pixel) of the same class connects two pixels.
        The class of each component, (components,).
    """
    begins = torch.ones_like(classes, dtype=torch.bool)
    begins[:, 1:] = classes[:, 1:] != classes[:, :-1]
    run = begins.flatten().cumsum(0, dtype=torch.int32).sub_(1).view(classes.shape)
    first, later, every = slice(None, -1), slice(1, None), slice(None)
    touching = begins[first] | begins[later]  # of two runs below each other the first common pixel is enough
    edges = [_pairs(run, classes, (first, every), (later, every), touching)]
    touching = begins[first, 1:] & begins[later, 1:]  # other runs that touch at a corner are also below each other
    edges.append(_pairs(run, classes, (first, first), (later, later), touching))
    edges.append(_pairs(run, classes, (first, later), (later, first), touching))
    parent = _lowest_connected(int(run[-1, -1]) + 1, torch.cat(edges, 1))
    is_first = parent == torch.arange(len(parent), device=parent.device)
    number_of_run = (is_first.cumsum(0) - 1)[parent].int()
    return number_of_run.index_select(0, run.flatten()).view(classes.shape), classes[begins][is_first]


Part = tuple[slice, slice]


def _pairs(run: Tensor, classes: Tensor, one: Part, other: Part, touching: Tensor) -> Tensor:
    """Runs of the same class (2, pairs) in two shifted parts of the map, where ``touching``."""
    same = (classes[one] == classes[other]).logical_and_(touching)
    return torch.stack([run[one][same], run[other][same]]).long()


def _lowest_connected(nodes: int, edges: Tensor) -> Tensor:
    """The lowest node that is connected with each: int64 (nodes,), of ``edges`` int64 (2, edges)."""
    parent = torch.arange(nodes, device=edges.device)
    while True:
        edges = parent[edges]
        edges = edges[:, edges[0] != edges[1]]
        if not edges.numel():
            return parent
        parent.scatter_reduce_(0, edges.amax(0), edges.amin(0), "amin")  # a root gets a lower one as its parent
        while not (above := parent[parent]).equal(parent):
            parent = above


class SmallObjects:
    """How many small objects are found: at least half of their pixels have their class in the prediction.

    Args:
        num_classes: number of classes.
        ignore_index: label value of pixels that belong to no object.
        below_px: pixels from which on an object is not small.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, below_px: int = SMALL_PX) -> None:
        self.num_classes, self.ignore_index, self.below_px = num_classes, ignore_index, below_px
        self.counts = torch.zeros(2, num_classes, dtype=torch.int64)
        """By class: small objects, and those of them that were found."""

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add an image: predicted classes and labels, integer (H, W)."""
        number, classes = components(target)
        pixels = torch.bincount(number.flatten(), minlength=len(classes))
        hits = torch.bincount(number[pred == target], minlength=len(classes))
        small = (classes != self.ignore_index) & (pixels < self.below_px)
        for row, chosen in enumerate((small, small & (2 * hits >= pixels))):
            self.counts[row] += torch.bincount(classes[chosen].long(), minlength=self.num_classes)

    def recall(self) -> Tensor:
        """Share of small objects that were found, of each class: float64 (classes,), NaN for a class without any."""
        return self.counts[1].double() / self.counts[0].double()
