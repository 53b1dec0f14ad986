"""What is refused before torch is imported, which takes seconds: paths that are not there, and streams.

A mistyped path is the most frequent mistake. Nothing here imports torch, nor anything that does.
"""

from __future__ import annotations

from pathlib import Path

from maskmatch_scale.checkpoints.layout import CheckpointError
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe import Recipe, SourceRecipe
from maskmatch_scale.recipe.learning import uses_unlabelled
from maskmatch_scale.recipe.values import SEGMENTER_FILE
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.redact import is_remote, shown
from maskmatch_scale.runs.data import recipe_of, run_of
from maskmatch_scale.runs.lock import refuse_live_run

_MORE_IMAGES = {"voc": "--all-images", "cityscapes": "--train-extra", "coco-stuff": "--unlabeled2017"}
"""The option of `maskmatch shards write` that adds the unlabelled images of a data set, by the source in an index."""


def check_start(recipe: Recipe, resume: str | None) -> None:
    """Refuse a run whose data or checkpoint are not there. Data on other machines are not asked for.

    In a job of several hosts nothing is checked: a rank that fails must tell those of the other hosts, for which it
    needs torch. `training/preflight.py` finds the same there.

    Args:
        recipe: as it was loaded.
        resume: `--resume`.

    Raises:
        UserError: names the key or option.
    """
    place = Place.from_environment()
    if place.world_size > place.local_world_size:
        return
    refuse_live_run(RunFolder(Path(recipe.run.dir)))
    check_data(recipe)
    if resume not in (None, "auto") and not Path(resume).exists():
        raise CheckpointError(f"--resume {resume}: no such run or checkpoint; name one that exists, or write auto")


def check_data(recipe: Recipe) -> None:
    """Refuse a run whose data are not on this machine, unless they are on another one.

    Raises:
        DataError: see :func:`check_streams`.
    """
    if not is_remote(recipe.data.root):
        check_streams(recipe, load_index(recipe.data.root, recipe.data))


def check_streams(recipe: Recipe, index: ShardIndex) -> None:
    """Refuse data without the streams that a recipe reads.

    Args:
        recipe: sections data and method are read.
        index: of `data.root`.

    Raises:
        DataError: names the stream, those that there are, and what to do.
    """
    data = recipe.data
    if data.labelled_count != 0 and not data.labelled:
        labelled = index.streams.get("labelled")
        if labelled is None or not labelled.labelled:
            raise DataError(f"{_without('labelled', recipe, index)}; {_instead_of_labelled(recipe, index)}")
    if uses_unlabelled(recipe.method) and not data.unlabelled and "unlabelled" not in index.streams:
        raise DataError(f"{_without('unlabelled', recipe, index)}; {_instead_of_unlabelled(recipe, index)}")
    for side in ("labelled", "unlabelled"):
        for source in getattr(data, side):
            _check_source(source, side, recipe, index)


def _check_source(source: SourceRecipe, side: str, recipe: Recipe, index: ShardIndex) -> None:
    root = source.root
    if root is None or is_remote(root):
        return
    own = index if root == recipe.data.root else load_index(root, recipe.data, key=f"data.{side}: root")
    if source.stream is not None and source.stream not in own.streams:
        raise DataError(
            f"data.{side}: stream={source.stream}: stream {source.stream!r} is not in its index ({shown(root)}), which "
            f"has {', '.join(own.streams)}"
        )


def _without(stream: str, recipe: Recipe, index: ShardIndex) -> str:
    there = index.streams.get(stream)
    what = f"no stream {stream!r}" if there is None else f"its stream {stream!r} has no label maps"
    return f"data.root={shown(recipe.data.root)}: {what} (it has {', '.join(index.streams)})"


def _instead_of_labelled(recipe: Recipe, index: ShardIndex) -> str:
    others = [name for name, stream in index.streams.items() if stream.labelled and name not in ("dev", "val")]
    if others:
        source = f"{{root: {shown(recipe.data.root)}, stream: {others[0]}}}"
        return f"name the one to learn from: 'data.labelled=[{source}]'"
    return (
        "write it again with label maps and --classes FILE, name a folder that has some: 'data.labelled=[{root: "
        "FOLDER}]', or adapt a trained model without labels: data.labelled_count=0 model.pretrained=RUN"
    )


def _instead_of_unlabelled(recipe: Recipe, index: ShardIndex) -> str:
    option = _MORE_IMAGES.get(index.source)
    again = f"write it again with {option} (maskmatch shards write), " if option else ""
    alone = "method.base=supervised" + ("" if recipe.method.mask.keep is None else " method.mask.keep=null")
    return (
        f"{again}name a folder that has one: 'data.unlabelled=[{{root: FOLDER}}]', or learn from labels alone: {alone}"
    )


def run_of_model(where: Path) -> Path | None:
    """The run directory that a path of a model belongs to; None: it is an export.

    Args:
        where: run directory, a checkpoint in one, or a folder that `maskmatch export` wrote.

    Raises:
        UserError: it is neither; names the path.
    """
    if not where.exists():
        raise UserError(f"{where}: no such run, checkpoint or export; name one that is there")
    if (where / SEGMENTER_FILE).is_file():
        return None
    run = run_of(where)
    if run is None:
        raise UserError(
            f"{where}: neither a run nor an export (no recipe.yaml and no {SEGMENTER_FILE} in it); name a run "
            "directory, or a folder that `maskmatch export` wrote"
        )
    return run


def held_out_images(where: Path, split: str) -> int:
    """Number of images in a split of a run's data.

    Raises:
        UserError: `where` is no run directory or checkpoint in one, or its data have no such split.
    """
    if not where.exists():
        raise UserError(f"{where}: no such run or checkpoint; name one that is there")
    data = recipe_of(run_of(where) or where).data
    index = load_index(data.root, data)
    stream = index.streams.get(split)
    if stream is not None and stream.labelled:
        return stream.samples
    labelled = [name for name, each in index.streams.items() if each.labelled]
    what = "no such stream in" if stream is None else "no label maps in this stream of"
    raise DataError(
        f"--split {split}: {what} {shown(data.root)}; evaluate on one of: {', '.join(labelled) or 'none there'}. "
        f"`maskmatch shards write … --{'dev' if split == 'dev' else 'val'} 0.1` holds samples out for one"
    )
