"""Writes pictures of predictions on held-out samples for the report; maps are palette PNGs in the class colours."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskmatch_scale.data.batches.held_out import evaluation_samples
from maskmatch_scale.data.images.bands import RGB_NAMES, shown_names
from maskmatch_scale.data.shards.folder import channels_of, load_index
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.evaluation.inference import Inference
from maskmatch_scale.files import write_whole
from maskmatch_scale.models.segmenter import Segmenter
from maskmatch_scale.models.units import sample_visible, visible_count, visible_pixel_mask
from maskmatch_scale.recipe import DataRecipe, MaskRecipe
from maskmatch_scale.seeds import generator


def save_pictures(
    folder: Path,
    data: DataRecipe,
    split: str,
    count: int,
    models: dict[str, Callable[[Tensor], Tensor]],
    inference: Inference,
) -> list[Path]:
    """Write image, label map and the prediction of each model, for ``count`` samples spread over a split.

    Of images with bands three are shown (`shown_names`).

    Args:
        folder: an empty one that becomes `RUN/pictures/<split>`; each sample gets a folder in it.
        data: section of the recipe, which says where the split is.
        split: stream name.
        count: number of samples, at least 1.
        models: `ema` and `student` segmenters, in eval mode.
        inference: how the models are run on images.

    Returns:
        The folders of the samples.
    """
    index = load_index(data.root, data)
    palette = flat_palette(index.palette)
    shown = _shown(index, data)
    samples = index.stream(split).samples
    numbers = range(0, samples, max(1, samples // count))[:count]
    written = []
    for sample in evaluation_samples(data, split, numbers=numbers):
        target = folder / f"{sample.number:05d}-{Path(sample.key).name}"
        target.mkdir(parents=True, exist_ok=True)
        _save(Image.fromarray(sample.image[shown].permute(1, 2, 0).numpy()), target / "image.png")
        save_map(sample.label, palette, target / "label.png")
        for name, model in models.items():
            save_map(inference.predict(model, sample.image), palette, target / f"prediction-{name}.png")
        written.append(target)
    described = {"classes": index.classes, "palette": index.palette, "ignore_index": index.ignore_index}
    write_whole(folder / "classes.json", json.dumps(described))
    return written


@torch.no_grad()
def save_masked_pictures(
    folders: Sequence[Path],
    data: DataRecipe,
    split: str,
    segmenter: Segmenter,
    recipe: MaskRecipe,
    seed: int,
    crop_px: tuple[int, int],
    inference: Inference,
) -> None:
    """Add pictures of the visible units, and of the prediction made from them alone, to those of :func:`save_pictures`.

    The middle of the image, with the size of a training crop and without augmentation, is masked with the recipe's keep
    ratio. Samples smaller than a crop get no such pictures.

    Args:
        folders: those that :func:`save_pictures` returned.
        data: as for it.
        split: as for it.
        segmenter: in eval mode, on the device of ``inference``.
        recipe: section of the recipe; its `keep` is not None.
        seed: of the run; the masks are drawn from it.
        crop_px: height and width of a training crop.
        inference: how images are normalised.
    """
    assert recipe.keep is not None
    grid = segmenter.unit_grid(*crop_px)
    index = load_index(data.root, data)
    palette, shown = flat_palette(index.palette), _shown(index, data)
    numbers = [int(folder.name.partition("-")[0]) for folder in folders]
    samples = evaluation_samples(data, split, numbers=numbers)
    for number, (folder, sample) in enumerate(zip(folders, samples, strict=True)):
        rows, columns = crop_px
        height, width = sample.image.shape[1:]
        if height < rows or width < columns:
            continue
        top, left = (height - rows) // 2, (width - columns) // 2
        crop = sample.image[:, top : top + rows, left : left + columns]
        visible = sample_visible(1, grid, visible_count(grid, recipe.keep), generator(seed, "picture mask", number))
        seen = visible_pixel_mask(visible, grid, segmenter.unit_px)[0].numpy()
        picture = crop[shown].permute(1, 2, 0).numpy()
        _save(Image.fromarray(np.where(seen[..., None], picture, np.uint8(128))), folder / "visible.png")
        images = inference.normalise(crop)[None]
        logits = segmenter(images, visible.to(images.device), recipe.mode)
        scores = torch.nn.functional.interpolate(logits.float(), size=crop_px, mode="bilinear")
        save_map(scores.argmax(1)[0].cpu(), palette, folder / "prediction-visible.png")


def _shown(index: ShardIndex, data: DataRecipe) -> list[int]:
    """Channels that pictures of the samples show."""
    channels = channels_of(index, data)
    names = RGB_NAMES if channels is None else channels.names
    return [names.index(name) for name in shown_names(names)]


def save_map(classes: Tensor, palette: Sequence[int], path: Path) -> None:
    """Write an integer map (H, W) as a palette PNG."""
    picture = Image.fromarray(classes.to(torch.uint8).numpy())
    picture.putpalette(list(palette))
    _save(picture, path)


def _save(picture: Image.Image, path: Path) -> None:
    packed = io.BytesIO()
    picture.save(packed, "PNG")
    write_whole(path, packed.getvalue())


def flat_palette(colours: Sequence[tuple[int, int, int]]) -> list[int]:
    """A palette of 256 RGB colours for Pillow: those of the classes, and black for all other values."""
    flat = [channel for colour in colours for channel in colour]
    return flat + [0] * (768 - len(flat))
