"""The model card of an export: the model, its training, its scores, how to load it, and what is not known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskmatch_scale.evaluation.inference import described
from maskmatch_scale.export.description import Description
from maskmatch_scale.export.kinds import kind_of
from maskmatch_scale.export.markdown import code, plain, string
from maskmatch_scale.models import Segmenter
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.recipe.learning import uses_unlabelled
from maskmatch_scale.record.run_files import Score, read_run
from maskmatch_scale.record.summary import summarise_files
from maskmatch_scale.runs.data import RunData


def model_card(
    name: str,
    run: Path,
    recipe: Recipe,
    data: RunData,
    description: Description,
    segmenter: Segmenter,
    state: Mapping[str, Any],
) -> str:
    """The card as Markdown, with the front matter that model hubs read.

    Args:
        name: name of the export's folder.
        run: run directory, from which figures are read.
        recipe: of the run.
        data: what the model was trained on.
        description: of the export.
        segmenter: of the run, on any device; its parameters are counted.
        state: `state.json` of the checkpoint; its number of ranks, precision and frozen teacher are used.

    Raises:
        UserError: a file of the run cannot be read.
    """
    files = read_run(run)
    method = summarise_files(files).method
    scores = newest_scores((*files.progress, *files.scores), description)
    library = kind_of(description.backbone).library
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: image-segmentation\ntags:\n- semantic-segmentation\n"
        "- maskmatch_scale\n---",
        f"# {plain(name)}",
        f"Semantic segmentation of images into {len(description.classes)} classes: "
        f"{', '.join(map(plain, description.classes))}. "
        f"Written by `maskmatch export`, maskmatch_scale {description.versions['maskmatch_scale']}.",
        _facts(recipe, description, segmenter),
        "## Training",
        _training(method, recipe, data, state),
        "## Figures",
        _figures(scores, recipe, data, description),
        "## Input",
        _input(description, segmenter),
        "## Loading",
        _loading(name, description),
        "## Not known",
        _limits(recipe),
        "## Licence",
        "Whoever passes this model on must fill this in. It depends on the images and labels it was trained with, and "
        "on the weights it started from.",
    ]
    return "\n\n".join(parts) + "\n"


def newest_scores(scores: tuple[Score, ...], description: Description) -> list[Score]:
    """One score of the exported weights for each split: of the exported step, or the last given if there is none."""
    kept: dict[str, Score] = {}
    for score in scores:
        if score.weights == description.weights and score.miou is not None:
            before = kept.get(score.split)
            if before is None or score.step == description.step or before.step != description.step:
                kept[score.split] = score
    return list(kept.values())


def _facts(recipe: Recipe, description: Description, segmenter: Segmenter) -> str:
    parameters = sum(p.numel() for n, p in segmenter.named_parameters() if not n.startswith("context."))
    kind = "teacher (running average of the student)" if description.weights == "ema" else "student"
    pretrained = recipe.model.pretrained
    start = "random weights"
    if isinstance(pretrained, str):
        start = f"weights of {code(Path(pretrained).name, cell=True)}"
    elif pretrained:
        start = "the backbone's published weights"
    rows = {
        "backbone": code(description.backbone, cell=True),
        "head": code(description.head, cell=True),
        "parameters": f"{parameters / 1e6:.2f} M",
        "weights": f"{kind}, step {description.step} of {recipe.run.steps}",
        "started from": start,
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _training(method: str, recipe: Recipe, data: RunData, state: Mapping[str, Any]) -> str:
    ranks = state["world_size"]
    unlabelled = uses_unlabelled(recipe.method)
    labelled_images = (
        data.samples.get("labelled", 0) if recipe.data.labelled_count is None else recipe.data.labelled_count
    )
    batch = recipe.engine.micro_batch * recipe.engine.accumulation * ranks
    images, a_step = f"{labelled_images} labelled images", f"{batch if labelled_images else 0} labelled images"
    if unlabelled:
        counted = "unlabelled" in data.samples
        images += f" and {data.samples['unlabelled']} unlabelled ones" if counted else " and uncounted unlabelled ones"
        a_step += f" and {batch * recipe.data.unlabelled_per_labelled} unlabelled ones"
    height, width = recipe.data.crop_px
    mask = recipe.method.mask
    lines = [
        f"- Method: {plain(method)} ([maskmatch_scale](https://arxiv.org/abs/2312.08631) is written from the abstract "
        "of its paper)." if mask.keep is not None else f"- Method: {plain(method)}.",
        f"- Data: {images} of the source {code(data.source)}; crops of {height}×{width} px, resized by factors of "
        f"{recipe.data.scale_range[0]:g} to {recipe.data.scale_range[1]:g}.",
        f"- {a_step} a step, {ranks} rank{'s' if ranks > 1 else ''}, precision {state['precision']}, "
        f"`optim.lr` {recipe.optim.lr:g}, seed {recipe.run.seed}.",
    ]  # fmt: skip
    if unlabelled and recipe.method.frozen_teacher is not None:
        name, step = (state["frozen_teacher"][fact] for fact in ("name", "step"))
        lines.append(
            f"- Unlabelled images were labelled by {code(name)}, step {step}, another model whose weights were frozen."
        )
    if mask.keep is not None:
        twice = ", and a second one with as many of the others" if mask.complement else ""
        lines.append(f"- Masked view: {mask.keep:.0%} of the units visible, mode `{mask.mode}`{twice}.")
    if recipe.method.base_keep is not None:
        lines.append(
            f"- Views of the base: {recipe.method.base_keep:.0%} of the units visible, the others not computed."
        )
    return "\n".join(lines)


def _figures(scores: list[Score], recipe: Recipe, data: RunData, description: Description) -> str:
    if not scores:
        return "None: this run has no evaluation of these weights."
    rows = ["| split | images | step | mIoU | pixel accuracy |", "|---|---|---|---|---|"]
    for score in scores:
        images = data.samples.get(score.split)
        figures = f"{_share(score.miou)} | {_share(score.pixel_accuracy)}"
        rows.append(f"| {plain(score.split)} | {_or_dash(images)} | {_or_dash(score.step)} | {figures} |")
    own = described(recipe.evaluation, recipe.data.crop_px)
    ways = {score.split: score.inference or own for score in scores}
    if len(set(ways.values())) == 1:
        ways = {"Predicted": next(iter(ways.values()))}
    notes = [f"{plain(split)}: {plain(way)}." for split, way in ways.items()]
    notes.append("Counted at the labels' own resolution, in one matrix over all pixels.")
    if any(score.split == "dev" for score in scores):
        notes.append("Settings may have been chosen by figures on `dev`.")
    if any(score.step != description.step for score in scores):
        notes.append(f"Figures of another step than {description.step} belong to other weights than these.")
    by_class = [score for score in scores if score.iou]
    blocks = ["\n".join(rows), " ".join(notes)]
    if by_class:
        names = list(dict.fromkeys(name for score in by_class for name in score.iou))
        table = [
            "| IoU | " + " | ".join(plain(score.split) for score in by_class) + " |",
            "|---" * (len(by_class) + 1) + "|",
            *(
                f"| {plain(name)} | " + " | ".join(_share(score.iou.get(name)) for score in by_class) + " |"
                for name in names
            ),
        ]
        blocks.append("\n".join(table))
    return "\n\n".join(blocks)


def _input(description: Description, segmenter: Segmenter) -> str:
    height, width = description.image_size
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (description.mean, description.std))
    patch = segmenter.patch_px
    sizes = "any size" if patch == 1 else f"sides that are multiples of {patch} px"
    channels = "RGB in 0–1"
    if description.bands:
        rows = (f"- {plain(band.name)}: {band.low:g} to {band.high:g}" for band in description.bands)
        channels = (
            f"{len(description.bands)} channels, in this order, with the stored values that become 0 and 1 (in 255 "
            "steps; values outside become 0 or 1):\n\n" + "\n".join(rows) + "\n\nThese in 0–1"
        )
    return (
        f"{channels}, minus the mean ({mean}), divided by the standard deviation ({std}). Trained on crops of "
        f"{height}×{width} px; it takes {sizes}, but sizes other than those under Figures were not tested. Logits may "
        "be coarser than the image: upsample them bilinearly."
    )


def _loading(name: str, description: Description) -> str:
    ours = f"""With maskmatch_scale:

```python
import torch
from maskmatch_scale.export import load_export

segmenter = load_export({string(name)})
logits = segmenter(images)  # images: float (B, {len(description.channels)}, H, W), normalised as above
scores = torch.nn.functional.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)
labels = scores.argmax(1)
```

`segmenter.json` has the classes and their colours."""
    theirs = kind_of(description.backbone).card_section(name, description)
    return f"{theirs}\n\n{ours}"


def _limits(recipe: Recipe) -> str:
    return "\n".join(
        [
            f"- How much the figures change with another seed: this is one run, with seed {recipe.run.seed}.",
            "- How good it is on images unlike those of its data, and whether its probabilities are calibrated.",
            "- Whether it treats groups of people or places alike.",
        ]
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _or_dash(value: int | None) -> str:
    return "–" if value is None else str(value)
