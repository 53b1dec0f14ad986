"""Multiply–adds of an encoder, from its architecture: what a pass must cost, however it is implemented.

Counted are products of matrices, attention and convolutions, one multiply–add for each scalar product. Elementwise
operations, norms and resampling are not counted. For whole images the count is that of the library's own forward pass:
`tests/models/test_cost.py` counts what torch dispatches there, and the two are equal. For visible units it is what
their tokens need. The ratio of the two is thus the speed-up that a perfect implementation of dropping would reach if
all products ran at one speed.
"""

from __future__ import annotations

from maskmatch_scale.models.backbone import Macs
from maskmatch_scale.models.segmenter import Segmenter


def encoder_macs(segmenter: Segmenter, height_px: int, width_px: int, visible_units: int | None = None) -> int:
    """Multiply–adds of one image's forward pass through the backbone: no head, no context decoder.

    Only shapes are read, so a model on the meta device is enough. Every encoder has its own formula: `Encoder.macs`.

    Args:
        segmenter: gives the backbone and the side of a unit.
        height_px: height of the image, pixels.
        width_px: width of the image, pixels.
        visible_units: how many units are visible; None: the library's forward on the whole image.

    Raises:
        ValueError: an image that the backbone does not take or that is not whole units; more units than there are.
    """
    return sum(_macs(segmenter, height_px, width_px, visible_units))


def encoder_train_macs(segmenter: Segmenter, height_px: int, width_px: int, visible_units: int | None = None) -> int:
    """Multiply–adds of one image's forward and backward pass through the backbone; arguments as for `encoder_macs`.

    For every product there are two of its size in backward, one for the gradient of each factor. Images need no
    gradient, so the sum is 3 · forward − first layer. What is frozen with everything below it has no backward pass. In
    this sum nothing is recomputed.
    """
    first, rest, frozen = _macs(segmenter, height_px, width_px, visible_units)
    if segmenter.frozen == "backbone":
        return first + rest + frozen
    return 2 * first + 3 * rest + frozen


def encoder_tokens(segmenter: Segmenter, height_px: int, width_px: int, visible_units: int | None = None) -> int:
    """Tokens of one image at the backbone's finest level, without class and register tokens.

    Arguments as for `encoder_macs`. Of a ViT these are the patches; a SegFormer has fewer tokens at its other levels.
    """
    stride = segmenter.encoder.strides[0]
    if visible_units is None:
        return (height_px // stride) * (width_px // stride)
    return visible_units * (segmenter.unit_px // stride) ** 2


def _macs(segmenter: Segmenter, height: int, width: int, visible_units: int | None) -> Macs:
    if visible_units is None:
        segmenter.check_size(height, width)
    else:
        rows, cols = segmenter.unit_grid(height, width)
        if not 1 <= visible_units <= rows * cols:
            raise ValueError(f"visible_units: {visible_units} out of {rows}×{cols}; it must be 1 … {rows * cols}")
    return segmenter.encoder.macs(height, width, visible_units)
