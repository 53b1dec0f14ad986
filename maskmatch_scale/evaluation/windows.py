"""Windows that cover an image of any size, and their probabilities blended in memory that does not grow with height."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def window_starts(side: int, window: int, overlap: float) -> list[int]:
    """First rows (or columns) of windows that are evenly spread and cover ``side`` px.

    Args:
        side: side of the image, px. If it is less than ``window``, one window covers it.
        window: side of a window, px.
        overlap: smallest share by which neighbouring windows overlap, 0 ≤ overlap < 1.
    """
    if side <= window:
        return [0]
    count = math.ceil((side - window) / (window * (1 - overlap))) + 1
    return [round(i * (side - window) / (count - 1)) for i in range(count)]


@dataclass(frozen=True)
class Block:
    """A finished part of an image."""

    rows: slice
    columns: slice
    probabilities: Tensor
    """float32 (classes, rows, columns), of sum 1 over the classes."""

    def within(self, height: int, width: int) -> Block:
        """The block without what lies outside of an image of height × width px."""
        rows = slice(self.rows.start, min(self.rows.stop, height))
        columns = slice(self.columns.start, min(self.columns.stop, width))
        inside = self.probabilities[:, : rows.stop - rows.start, : columns.stop - columns.start]
        return Block(rows, columns, inside)


class Blend:
    """Mean of the windows over each pixel, given back in blocks as soon as no later window covers them.

    Windows come row by row, from the left to the right. Kept are only the parts of finished windows that a later one
    covers too: a strip as wide as the image and as high as the overlap, and the overlap with the window before.

    Args:
        tops: first rows of the windows, as :func:`window_starts` gives them.
        lefts: first columns, likewise.
        window_px: height and width of a window.
    """

    def __init__(self, tops: list[int], lefts: list[int], window_px: tuple[int, int]) -> None:
        self._tops, self._lefts, self._window_px = tops, lefts, window_px
        self._number = 0
        self._below: Tensor | None = None
        """(classes, highest overlap, width), from its first row on what earlier rows of windows gave to the next."""
        self._right: Tensor | None = None
        """(classes, height of a window, overlap), what this row and earlier ones gave to the next window."""

    def open(self, classes: int, device: torch.device) -> Tensor:
        """What earlier windows gave to the place of the next window: add its probabilities, then :meth:`close`.

        Returns:
            float32 (classes, height, width of a window).
        """
        row, column = divmod(self._number, len(self._lefts))
        height, width = self._window_px
        total = torch.zeros(classes, height, width, device=device)
        known = 0
        if column:
            assert self._right is not None
            known = self._right.shape[2]
            total[:, :, :known] = self._right
        if row:
            assert self._below is not None
            left, common = self._lefts[column], self._tops[row - 1] + height - self._tops[row]
            total[:, :common, known:] = self._below[:, :common, left + known : left + width]
        return total

    def close(self, total: Tensor) -> Block:
        """Give back the part of the opened place that is finished now."""
        row, column = divmod(self._number, len(self._lefts))
        height, width = self._window_px
        top, left = self._tops[row], self._lefts[column]
        rows = self._tops[row + 1] - top if row + 1 < len(self._tops) else height
        columns = self._lefts[column + 1] - left if column + 1 < len(self._lefts) else width
        self._right = total[:, :, columns:]
        if len(self._tops) > 1:
            if self._below is None:
                most = max(before + height - after for before, after in zip(self._tops, self._tops[1:]))
                self._below = total.new_zeros(len(total), most, self._lefts[-1] + width)
            self._below[:, : height - rows, left : left + columns] = total[:, rows:, :columns]
        self._number += 1
        own = total[:, :rows, :columns]
        # Dividing by the number of windows over a pixel is the same as normalising its probabilities to sum 1.
        return Block(slice(top, top + rows), slice(left, left + columns), own / own.sum(0, keepdim=True))
