"""Comparing an ONNX graph, run by onnxruntime on a CPU, with the segmenter that it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from maskmatch_scale.export.graph.write import INPUT
from maskmatch_scale.models import Segmenter

PROBABILITY = 1e-3
"""Largest difference of a probability that is taken for rounding of float32. Then two classes can change places only
where their probabilities differ by at most twice as much."""
LOGITS = 0.01
"""Largest difference of a logit, as a share of the standard deviation of all logits. Probabilities of an untrained
model hardly depend on its features, so that they alone would show little."""


@dataclass(frozen=True)
class Difference:
    """Of a graph from torch, over all tiles; probabilities and classes at the size of the images."""

    logits: float
    """Largest absolute difference."""
    logits_std: float
    """Standard deviation of torch's logits."""
    probabilities: float
    """Largest absolute difference."""
    same_class: float
    """Share of pixels of the same class, 0–1."""

    @property
    def is_rounding(self) -> bool:
        """Whether it is no more than float32 explains; False if something is not finite."""
        return self.probabilities <= PROBABILITY and self.logits <= LOGITS * self.logits_std

    def in_words(self) -> str:
        """One line, without a full stop."""
        return (
            f"probabilities differ by at most {self.probabilities:.1e}, logits by {self.logits:.1e} (standard "
            f"deviation {self.logits_std:.1e}), classes of {_share(self.same_class)} of the pixels are the same"
        )

    def as_json(self) -> dict[str, float]:
        """By the names of the fields."""
        return asdict(self)


@torch.no_grad()
def compare(segmenter: Segmenter, file: Path, tiles: Sequence[Tensor], batch: int = 1) -> Difference:
    """Run both on the same images.

    Args:
        segmenter: in eval mode, on the CPU.
        file: the graph.
        tiles: float32 (1, channels, H, W) each, normalised.
        batch: how many the graph is given at once; the last batch may be smaller.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    logits, probabilities, same, pixels = 0.0, 0.0, 0, 0
    total, squares, count = 0.0, 0.0, 0
    for start in range(0, len(tiles), batch):
        images = torch.cat(list(tiles[start : start + batch]))
        found = torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])
        for image, other in zip(images, found, strict=True):
            expected = segmenter(image[None])
            other = other[None]
            logits = _largest(logits, expected - other)
            total, squares, count = (
                total + float(expected.double().sum()),
                squares + float(expected.double().square().sum()),
                count + expected.numel(),
            )
            ours, theirs = (_probabilities(values, image) for values in (expected, other))
            probabilities = _largest(probabilities, ours - theirs)
            same += int((ours.argmax(1) == theirs.argmax(1)).sum())
            pixels += image.shape[1] * image.shape[2]
    std = max(0.0, squares / count - (total / count) ** 2) ** 0.5
    return Difference(logits, std, probabilities, same / pixels)


def _probabilities(logits: Tensor, image: Tensor) -> Tensor:
    return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False).softmax(1)


def _largest(so_far: float, difference: Tensor) -> float:
    """NaN stays NaN, which `max` of Python would lose."""
    return float(torch.maximum(torch.tensor(so_far, dtype=torch.float64), difference.abs().max().double()))


def _share(value: float) -> str:
    """A share in percent that is 100 only if it is whole."""
    return "all" if value == 1 else f"{min(value, 0.999999):.4%}"
