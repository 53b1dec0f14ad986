"""Evaluate a segmenter on a labelled split, each image once over all ranks, all ranks in lock-step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from maskmatch_scale.data.stream import evaluation_samples
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.evaluation.sliding import forwards_of, sliding_probabilities
from maskmatch_scale.recipe import EvaluationRecipe


@dataclass(frozen=True)
class Window:
    """How an image is cut into what the segmenter sees."""

    size_px: tuple[int, int]
    recipe: EvaluationRecipe
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 (3, H, W) to float on the device."""
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (image.to(self.device) / 255 - mean) / std

    def predict(self, segmenter: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
        """Class of every pixel of a uint8 image (3, H, W): int64 (H, W), on the CPU."""
        scores = sliding_probabilities(
            segmenter, self.normalise(image), self.size_px, self.recipe.overlap, self.recipe.window_batch
        )
        return scores.argmax(0).cpu()


def evaluate(
    segmenter: Callable[[Tensor], Tensor],
    samples: Iterator[tuple[int, str, Tensor, Tensor]],
    window: Window,
    matrix: ConfusionMatrix,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Add the predictions of this rank's samples to ``matrix``.

    Args:
        segmenter: normalised images to logits, in eval mode.
        samples: (number, key, uint8 image (3, H, W), uint8 label (H, W)).
        window: how images are cut.
        matrix: counts are added to it; the caller sums it over ranks.
        progress: called after every image.
    """
    for _, key, image, label in samples:
        if image.shape[-2:] != label.shape:
            raise ValueError(f"{key}: image {tuple(image.shape[-2:])} px, label map {tuple(label.shape)}")
        matrix.update(window.predict(segmenter, image), label)
        progress()


def evaluate_split(
    segmenter: Callable[[Tensor], Tensor],
    root: str,
    split: str,
    window: Window,
    matrix: ConfusionMatrix,
    place: tuple[int, int] = (0, 1),
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda counts: counts,
    progress: Callable[[], None] = lambda: None,
) -> int:
    """Evaluate a split over all ranks; the matrix then holds the global counts on every rank.

    Ranks that have fewer windows to run than another run empty ones: at ZeRO-3 a forward is a collective.

    Args:
        segmenter: normalised images to logits.
        root: shard folder.
        split: stream name, for example `dev`.
        window: how images are cut.
        matrix: filled.
        place: (rank, world size).
        sum_over_ranks: all-reduces a tensor.
        progress: called after every image of this rank.

    Returns:
        The number of images over all ranks.
    """
    rank, world_size = place
    done = torch.zeros(world_size, dtype=torch.int64)

    def counted() -> Iterator[tuple[int, str, Tensor, Tensor]]:
        for sample in evaluation_samples(root, split, rank, world_size):
            size = (sample[2].shape[-2], sample[2].shape[-1])
            done[rank] += forwards_of(size, window.size_px, window.recipe.overlap, window.recipe.window_batch)
            images[0] += 1
            yield sample

    images = torch.zeros(1, dtype=torch.int64)
    evaluate(segmenter, counted(), window, matrix, progress)
    everyone = sum_over_ranks(done.to(window.device))
    with torch.no_grad():
        for _ in range(int(everyone.max()) - int(everyone[rank])):
            segmenter(torch.zeros(1, 3, *window.size_px, device=window.device))
    matrix.counts = sum_over_ranks(matrix.counts.to(window.device)).cpu()
    return int(sum_over_ranks(images.to(window.device)))
