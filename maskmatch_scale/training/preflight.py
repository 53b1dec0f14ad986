"""All checks of a run, in order, before anything is written.

A run that is refused leaves nothing behind. :func:`check` reads files and builds the model, :func:`check_agreement`
compares the ranks. Mistakes that the recipe alone shows were refused when it was loaded (`recipe/soundness.py`).

Decision: docs/decisions/0026-mistakes-before-anything-is-written.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from maskmatch_scale.checkpoints.finding import Checkpoint, damage, find, first_damaged, has_checkpoint
from maskmatch_scale.checkpoints.fit import check_fit, model_facts
from maskmatch_scale.data.batches.loading import check_shared_memory
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.data.images.bands import in_words
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.engine.build import check_settings
from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.precision import choose_precision
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.errors import UserError
from maskmatch_scale.export.opening import Model
from maskmatch_scale.extras import require
from maskmatch_scale.method.maskmatch import view_draws
from maskmatch_scale.models import Segmenter
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.recipe.by_class import thresholds_by_class, weights_by_class
from maskmatch_scale.recipe.learning import makes_views, uses_unlabelled
from maskmatch_scale.recipe.trackers import TRACKERS
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.redact import shown
from maskmatch_scale.runs.data import RunData, describe_data
from maskmatch_scale.runs.first_checks import check_streams
from maskmatch_scale.runs.lock import refuse_live_run
from maskmatch_scale.runs.model import build_student
from maskmatch_scale.runs.model_checks import check_backbone, check_graphs, check_model, check_statistics, freeze
from maskmatch_scale.seeds import derive_seed
from maskmatch_scale.training.frozen_teacher import (
    check_bands,
    check_classes,
    check_same_teacher,
    open_teacher,
    teacher_facts,
)
from maskmatch_scale.training.memory_check import check_memory


@dataclass(frozen=True)
class Checked:
    """A run that passed :func:`check`. Nothing of it has been written, and no process group exists yet."""

    recipe: Recipe
    """With the precision that was chosen and the number of steps that was counted."""
    precision_reason: str
    """Why this precision was chosen, for the log."""
    data: RunData
    batches: TrainingBatches
    """Of this rank. If the run continues, they begin where the checkpoint was written."""
    student: Segmenter
    """In host memory: whole, or at ZeRO-3 without its weights (`Segmenter.deferred`)."""
    place: Place
    model: dict[str, Any]
    """What a checkpoint says of the model (`checkpoints/fit.py`)."""
    checkpoint: Checkpoint | None
    """The checkpoint that the run continues from; None: a new run."""
    frozen_teacher: Model | None = None
    """Labels the unlabelled images (`method.teacher`); None: the average of the student does."""
    frozen_facts: dict[str, Any] | None = None
    """What a checkpoint says of it (`training/frozen_teacher.py`)."""

    @property
    def folder(self) -> RunFolder:
        """The run directory."""
        return RunFolder(Path(self.recipe.run.dir))

    @property
    def continues_in_place(self) -> bool:
        """Whether the checkpoint lies in this run's own directory, or in what its `checkpoints` is a link to."""
        if self.checkpoint is None:
            return False
        at, own = self.checkpoint.folder, self.folder.checkpoints
        return self.folder.path.resolve() in at.resolve().parents or (own.exists() and own.samefile(at.parent))


def check(recipe: Recipe, resume: str | None) -> Checked:
    """Check everything that a run needs, on this rank.

    Args:
        recipe: as it was loaded.
        resume: see :func:`maskmatch_scale.train.train`.

    Raises:
        UserError: the first mistake that is found; the message names the key, file or value, and what to do.
    """
    place = Place.from_environment()
    refuse_live_run(RunFolder(Path(recipe.run.dir)))
    check_backbone(recipe)
    check_trackers(recipe)
    index = load_index(recipe.data.root, recipe.data, fresh=True)
    check_streams(recipe, index)
    teacher = open_teacher(recipe)
    described = describe_data(recipe, index)
    if teacher is not None:
        check_classes(recipe, teacher, described.classes)
        check_bands(recipe, teacher, described.bands)
    student = build_student(recipe, described, deferred=recipe.engine.zero_stage == 3)
    freeze(recipe, student)
    check_model(recipe, student)
    check_statistics(recipe, student)
    check_graphs(recipe, student, place.world_size)
    has_batchnorm = any(isinstance(module, _BatchNorm) for module in student.modules())
    precision, reason = choose_precision(recipe, batchnorm=has_batchnorm)
    recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"precision": precision})})
    check_settings(recipe, place.world_size)
    check_memory(recipe, student, teacher.segmenter if teacher is not None else None, place)
    recipe, batches = _open_batches(recipe, student, place, index)
    check_profile(recipe)
    check_scored(recipe, index)
    if "dev" in index.streams:  # opening the stream now finds a missing shard before the first evaluation does
        ShardStream(recipe.data.root, "dev", recipe.data, index=index)
    used: dict[str, int | None] = {
        "labelled": batches.labelled_samples,
        "unlabelled": batches.unlabelled_samples,
    }
    data = describe_data(recipe, index, used)
    check_class_names(recipe, data)
    head = recipe.model.head or student.family.default_head
    model = model_facts(recipe, head, student.num_classes, data.classes, in_words(data.bands) if data.bands else ())
    facts = teacher_facts(recipe, teacher) if teacher is not None else None
    checked = Checked(recipe, reason, data, batches, student, place, model, None, teacher, facts)
    checkpoint = _checkpoint_to_resume(RunFolder(Path(recipe.run.dir)), resume)
    checked = checked if checkpoint is None else _continued(checked, checkpoint)
    check_shared_memory(batches, recipe.run.steps * recipe.engine.accumulation, place.local_world_size)
    return checked


def _continued(checked: Checked, checkpoint: Checkpoint) -> Checked:
    """The run as one that continues from a checkpoint.

    Raises:
        UserError: the checkpoint is of another model or frozen teacher, or its stream state cannot be read.
    """
    shapes = {name: tuple(value.shape) for name, value in checked.student.state_dict().items()}
    check_fit(checkpoint, checked.model, shapes)
    check_same_teacher(checkpoint, checked.recipe, checked.frozen_facts)
    checked.batches.resume(checkpoint.stream())
    return replace(checked, checkpoint=checkpoint)


def check_trackers(recipe: Recipe) -> None:
    """Refuse trackers whose library is not installed; none is imported. All ranks check it, although rank 0 alone
    will import it, so that all of them end.

    Raises:
        UserError: names the key, and the command that installs the library.
    """
    for name in recipe.record.trackers:
        require([TRACKERS[name].library], name, f"record.trackers={list(recipe.record.trackers)}")


def check_scored(recipe: Recipe, index: ShardIndex) -> None:
    """Refuse what goes by the scores on `dev` if there is no `dev`: the best checkpoints alone, and an early end.

    Raises:
        UserError: names the keys.
    """
    run, dev = recipe.run, index.streams.get("dev")
    if dev is not None and dev.labelled:
        return
    has_none = f"{shown(recipe.data.root)} has no labelled split `dev`, which says"
    if run.keep_last == run.keep_every == 0:
        raise UserError(
            f"run.keep_best={run.keep_best} with run.keep_last=0 and run.keep_every=0: {has_none} which checkpoints "
            "are the best; set run.keep_last"
        )
    if run.patience is not None:
        raise UserError(f"run.patience={run.patience}: {has_none} when a run ends early; leave it out")


def check_class_names(recipe: Recipe, data: RunData) -> None:
    """Refuse names of classes that the data do not have, and weights that leave nothing of the labelled loss.

    Raises:
        UserError: names the key, and the nearest class.
    """
    try:
        weights = weights_by_class(recipe.method, data.classes, len(data.classes))
        thresholds_by_class(recipe.method, data.classes, len(data.classes))
    except ValueError as error:
        raise UserError(str(error)) from None
    if weights is not None and not any(weights):
        raise UserError("method.class_weights: all classes have the weight 0, so no label would count; raise one")


def check_profile(recipe: Recipe) -> None:
    """Refuse to profile steps that the run does not have; their number is known now.

    Raises:
        UserError: names the key and the number of steps.
    """
    profile, steps = recipe.run.profile, recipe.run.steps
    if profile is not None and profile[1] > steps:
        raise UserError(f"run.profile={list(profile)}: the run has {steps} steps; name steps from 1 to {steps}")


def _open_batches(
    recipe: Recipe, student: Segmenter, place: Place, index: ShardIndex
) -> tuple[Recipe, TrainingBatches]:
    """The training batches, and the recipe with the number of its steps."""

    def batches_of(recipe: Recipe) -> TrainingBatches:
        draw = None
        if makes_views(recipe.method):
            draw = view_draws(student, recipe.method, recipe.run.seed, recipe.data.crop_px)
        return TrainingBatches(
            recipe,
            student.num_classes,
            place.rank,
            place.world_size,
            unlabelled=uses_unlabelled(recipe.method),
            draw=draw,
            index=index,
        )

    batches = batches_of(recipe)
    labelled = batches.unlabelled is None
    samples = batches.labelled_samples if labelled else batches.unlabelled_samples
    if samples is None:
        if recipe.run.epochs is not None:
            names = ", ".join(repr(source.name) for source in batches.sequential)
            raise UserError(
                f"run.epochs={recipe.run.epochs:g}: nobody knows how many samples the shards of {names} have, which no "
                "index lists; set run.steps, or write an index (`maskmatch shards index`)"
            )
        return recipe, batches
    images = recipe.engine.micro_batch * recipe.engine.accumulation * place.world_size
    images *= 1 if labelled else recipe.data.unlabelled_per_labelled
    counted = recipe.with_steps(samples, images, labelled=labelled)
    return counted, batches if counted is recipe else batches_of(counted)


def _checkpoint_to_resume(folder: RunFolder, resume: str | None) -> Checkpoint | None:
    """The checkpoint that `--resume` means; None for a new run."""
    if resume is None:
        return None
    if resume == "auto":
        return find(folder.path) if has_checkpoint(folder.path) else None
    return find(Path(resume))


def verify_checkpoint(runtime: Runtime, checked: Checked) -> Checked:
    """Compare the checksums of the checkpoint that the run continues from; all ranks call it together.

    Each rank reads its share of the files. If one is damaged, and a run was named rather than a checkpoint, the
    checkpoint before is taken.

    Raises:
        UserError: on every rank: there is none that is whole.
    """
    while checked.checkpoint is not None:
        files = list(checked.checkpoint.index.files)
        own = range(runtime.rank, len(files), runtime.world_size)
        bad = {number for number in own if first_damaged(checked.checkpoint, [files[number]])}
        flags = torch.tensor([number in bad for number in range(len(files))], dtype=torch.int64, device=runtime.device)
        damaged = runtime.sum_over_ranks(flags).nonzero()
        if not len(damaged):
            break
        try:
            checked = _continued(checked, checked.checkpoint.instead(damage(files[int(damaged[0])])))
        except UserError as error:
            error.on_all_ranks = True
            raise
        deferred = checked.student.deferred is not None
        check_agreement(
            runtime,
            checked.recipe,
            checked.batches,
            checked.checkpoint,
            deferred=deferred,
            frozen=checked.frozen_facts,
        )
    return checked


def count_class_pixels(runtime: Runtime, recipe: Recipe, batches: TrainingBatches) -> None:
    """Count the pixels of every class, if the recipe uses these counts; all ranks call it together.

    This reads every labelled sample, so it is done before anything is written. It is done before the loader processes
    start, which inherit the result.

    Raises:
        BadSample: a label map cannot be used.
    """
    if recipe.data.rare_class_crops or recipe.method.class_weights == "inverse_sqrt":
        # Loader processes read the counts, so they come back to the host.
        batches.count_class_pixels(lambda counts: runtime.sum_over_ranks(counts.to(runtime.device)).cpu())


def check_agreement(
    runtime: Runtime,
    recipe: Recipe,
    batches: TrainingBatches,
    checkpoint: Checkpoint | None,
    *,
    deferred: bool,
    frozen: dict[str, Any] | None = None,
) -> None:
    """Refuse to train if the recipes, shards or checkpoints of the ranks differ; all ranks call it together.

    Args:
        runtime: this rank.
        recipe: with the number of its steps.
        batches: of this rank.
        checkpoint: to continue from.
        deferred: whether this rank makes its weights one at a time. One that found no local file for that would wait
            for other collectives than the others.
        frozen: :func:`teacher_facts` of a frozen teacher.

    Raises:
        UserError: on every rank, naming the first rank that differs from rank 0.
    """
    step = checkpoint.step if checkpoint is not None else 0
    data = recipe.data.model_copy(update={"cache_dir": None})
    facts = {
        "the recipe": repr(recipe.model_copy(update={"data": data})),
        "the checkpoint to continue from (--resume)": checkpoint.index.digest() if checkpoint is not None else "none",
        "the list of shards, or the place in it,": json.dumps(batches.state(step)),
        "the way to build the model (pretrained weights that one machine has, and another has not),": str(deferred),
        "the frozen teacher (method.teacher)": json.dumps(frozen),
    }
    known = torch.zeros(runtime.world_size, len(facts), dtype=torch.int64, device=runtime.device)
    known[runtime.rank] = torch.tensor([derive_seed(0, fact) for fact in facts.values()])
    known = runtime.sum_over_ranks(known)
    for number, what in enumerate(facts):
        differing = (known[:, number] != known[0, number]).nonzero()
        if len(differing):
            error = UserError(
                f"{what} of rank {int(differing[0])} differs from that of rank 0; every machine needs the same files "
                "under the same paths, and run.dir on a disk that all machines share"
            )
            error.on_all_ranks = True
            raise error
