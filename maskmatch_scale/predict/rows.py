"""From the blocks of a prediction to whole rows, in the types that are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from maskmatch_scale.evaluation.windows import Block
from maskmatch_scale.predict.reading import OpenImage

NO_DATA = 255
"""Class of pixels that have no data in a GeoTIFF. Models have at most 255 classes, 0 to 254."""


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows of a prediction, in the full width of the image."""

    top: int
    """First row."""
    classes: NDArray[np.uint8]
    """(h, W); :data:`NO_DATA` where the image has no data."""
    confidence: NDArray[np.uint8]
    """(h, W): probability of the class in 255ths, rounded; 0 where the image has no data."""
    probabilities: NDArray[np.float16] | None
    """(h, W, classes); None unless wanted."""


def rows_of(blocks: Iterable[Block], image: OpenImage, *, probabilities: bool) -> Iterator[Rows]:
    """Join blocks that lie side by side.

    In memory at a time are one row of blocks: 2 bytes a pixel, with ``probabilities`` 2 bytes more a class.

    Args:
        blocks: of :meth:`maskmatch_scale.evaluation.inference.Inference.blocks`, row by row.
        image: that they are of.
        probabilities: whether to keep those of all classes.
    """
    width = image.size_px[1]
    for block in blocks:
        if block.columns.start == 0:
            size = block.rows.stop - block.rows.start, width
            classes, confidence = np.empty(size, np.uint8), np.empty(size, np.uint8)
            every = np.empty((*size, len(block.probabilities)), np.float16) if probabilities else None
        best, number = block.probabilities.max(0)
        classes[:, block.columns] = number.to(torch.uint8).cpu()
        confidence[:, block.columns] = (best * 255).round().to(torch.uint8).cpu()
        if every is not None:
            every[:, block.columns] = block.probabilities.permute(1, 2, 0).to(torch.float16).cpu()
        if block.columns.stop == width:
            valid = image.valid(block.rows)
            if valid is not None:
                classes[~valid], confidence[~valid] = NO_DATA, 0
            yield Rows(block.rows.start, classes, confidence, every)
