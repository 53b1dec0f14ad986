"""Evaluates a segmenter on a labelled split. Each image is evaluated by one rank; all ranks proceed image by image."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing

import torch
from torch import Tensor

from maskmatch_scale.data.batches.held_out import evaluation_samples
from maskmatch_scale.data.faults import NotFetched
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.evaluation.inference import Inference
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.recipe import DataRecipe


def evaluate_split(
    segmenter: Callable[[Tensor], Tensor],
    data: DataRecipe,
    split: str,
    inference: Inference,
    matrix: ConfusionMatrix,
    place: tuple[int, int] = (0, 1),
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda counts: counts,
    progress: Callable[[], None] = lambda: None,
    break_off: Callable[[], bool] = lambda: False,
    patience_s: float = math.inf,
    unreachable: Callable[[NotFetched], None] | None = None,
) -> int | None:
    """Evaluate a split; all ranks call it together. The matrix then has the counts of all ranks, on every rank.

    At ZeRO-3 a forward is a collective. So for each image all ranks run as many forwards as the rank that needs the
    most, and the others run some of theirs on empty windows.

    Args:
        segmenter: normalised images to logits, in eval mode.
        data: section of the recipe: where the split is, and how many processes decode the next images (`workers`).
        split: stream name, for example `dev`.
        inference: how the segmenter is run on images.
        matrix: the counts are added to it.
        place: (rank, world size).
        sum_over_ranks: all-reduces a tensor.
        progress: called after every round, in which each rank evaluates one image.
        break_off: asked before every round. If it is True on any rank, all ranks end here.
        patience_s: how long a rank waits for a shard of which nothing comes. The others wait for it meanwhile.
        unreachable: called on a rank whose shard did not come; all ranks end here. None: the error is raised there, as
            every other error of a sample.

    Returns:
        The number of images over all ranks; None if a rank broke off or had no image; then the matrix means nothing.
    """
    rank, world_size = place
    images = load_index(data.root, data).stream(split).samples
    on_gpu = inference.device.type == "cuda"
    samples = evaluation_samples(
        data, split, rank, world_size, workers=data.workers, pin_memory=on_gpu, patience_s=patience_s
    )
    with closing(samples):  # ends its processes, also after an error
        for _ in range(math.ceil(images / world_size)):
            sample, is_missing, forwards = None, False, 0
            try:
                sample = next(samples, None)
            except NotFetched as error:
                if unreachable is None:
                    raise
                unreachable(error)
                is_missing = True
            if sample is not None:
                forwards = inference.forwards((sample.image.shape[-2], sample.image.shape[-1]))
            ends = is_missing or break_off()
            most, broken_off = _of_all_ranks(forwards, ends, rank, world_size, sum_over_ranks, inference.device)
            if broken_off:
                return None
            if sample is not None:
                matrix.update(inference.predict(segmenter, sample.image), sample.label)
            inference.run_empty(segmenter, most - forwards)
            progress()
    matrix.counts = sum_over_ranks(matrix.counts.to(inference.device)).cpu()
    return images


def _of_all_ranks(
    forwards: int,
    breaks_off: bool,
    rank: int,
    world_size: int,
    sum_over_ranks: Callable[[Tensor], Tensor],
    device: torch.device,
) -> tuple[int, bool]:
    """The most forwards of a rank, and whether any rank breaks off; all ranks call it together."""
    everyone = torch.zeros(2, world_size, dtype=torch.int64, device=device)
    everyone[0, rank], everyone[1, rank] = forwards, breaks_off
    most, breaking = sum_over_ranks(everyone).amax(1).tolist()
    return most, bool(breaking)
