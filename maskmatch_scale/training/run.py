"""A run on one rank: everything that its steps need, built."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from maskmatch_scale.checkpoints.finding import Checkpoint
from maskmatch_scale.checkpoints.fit import changes
from maskmatch_scale.checkpoints.keeping import Keep, Keeper
from maskmatch_scale.checkpoints.layout import CheckpointError
from maskmatch_scale.checkpoints.reading import StoredTensors, being_read
from maskmatch_scale.checkpoints.writing import CheckpointWriter
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.engine.build import build_engine
from maskmatch_scale.engine.ema import build_teacher
from maskmatch_scale.engine.frozen_teacher import FrozenTeacher
from maskmatch_scale.engine.members import own_store
from maskmatch_scale.engine.protocol import Engine, StoredTeacher
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.method.maskmatch import MaskMatch, class_weights
from maskmatch_scale.method.views import Neighbour
from maskmatch_scale.method.work import Work, step_work
from maskmatch_scale.models import Segmenter
from maskmatch_scale.models.batchnorm import synchronise_batchnorm
from maskmatch_scale.models.graphed import GraphedViews
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.recipe.by_class import thresholds_by_class, weights_by_class
from maskmatch_scale.recipe.learning import makes_views, uses_unlabelled
from maskmatch_scale.record.metrics import MetricsLog
from maskmatch_scale.record.run_folder import RunFolder
from maskmatch_scale.runs.data import RunData
from maskmatch_scale.training.agreement import Agreement, Stop
from maskmatch_scale.training.preflight import Checked

if TYPE_CHECKING:
    from maskmatch_scale.training.callbacks import Callback

log = logging.getLogger("maskmatch_scale")


@dataclass
class Run:
    """The objects that the loop, the step and the callbacks share."""

    recipe: Recipe
    precision_reason: str
    data: RunData
    folder: RunFolder
    batches: TrainingBatches
    runtime: Runtime
    student: Segmenter
    maskmatch: MaskMatch
    engine: Engine
    teacher: StoredTeacher
    """The average of the student, which is evaluated and exported, and labels unless there is a frozen teacher."""
    frozen_teacher: FrozenTeacher | None
    """Labels in place of the average (`method.teacher`)."""
    burn_in_work: Work
    """What a step of the burn-in asks of this rank's backbone."""
    work: Work
    """The same of a step after it."""
    metrics: MetricsLog
    """Collects the figures of steps and evaluations. Every rank has one; only that of rank 0 writes the file."""
    resumed: dict[str, Any]
    """`state.json` of the checkpoint that the run continues from; empty in a new run."""
    notes: tuple[str, ...]
    """Lines on the hosts and the links between them. On the checkpoint that the run continues from: damaged ones that
    were passed over, and what is different now. In a new run, on the weights that it starts from: what of them was not
    loaded."""
    model: dict[str, Any]
    """What a checkpoint says of the model (`checkpoints/fit.py`)."""
    frozen_facts: dict[str, Any] | None
    """What it says of the frozen teacher (`training/frozen_teacher.py`)."""
    writer: CheckpointWriter
    keeper: Keeper | None
    """On rank 0."""
    agreement: Agreement
    """What this rank wants, and what all ranks have agreed on."""
    save_s: float = 0.0
    """The longest that a checkpoint has taken on this rank in this start, from its beginning until it was complete."""
    end: int = 0
    """The step after which the run ends: `run.steps`, or an earlier one (:meth:`end_early`)."""
    callbacks: list[Callback] = field(default_factory=list)
    """In the order in which they are called."""

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint of this run, or the one that it continues from. It waits for one that is
        being written.
        """
        return self.writer.newest()

    @property
    def start(self) -> int:
        """Number of optimizer steps that were taken before this start."""
        return int(self.resumed.get("step", 0))

    def ask_to_stop(self, reason: str, exit_code: int = 1) -> None:
        """Ask to stop the run, from any thread of any rank. All ranks stop after the same step, at most two later.

        A checkpoint is written then, unless that fails; :attr:`stopping` says when all ranks know.

        Args:
            reason: one line that says why, and what to do.
            exit_code: of the command, 1 to 255. `errors.RESUMABLE`: the run only has to be started again.
        """
        # Nothing is logged here: a disk that hangs would keep the thread of the signals from a second Ctrl-C.
        self.agreement.ask(Stop(reason, exit_code))

    def end_early(self, done: int) -> None:
        """Let the run end after the step that was just taken, as after its last one; all ranks call it together.

        Args:
            done: number of steps that are taken.
        """
        self.end = done

    @property
    def stopping(self) -> Stop | None:
        """Why the run stops after this step, the same on all ranks; None: it goes on."""
        return self.agreement.decided

    def work_in(self, step: int) -> Work:
        """What step ``step`` (from 0) asks of this rank's backbone."""
        return self.burn_in_work if step < self.recipe.burn_in_steps else self.work

    def say(self, line: str) -> None:
        """Log a line, and give it to the callbacks to show."""
        log.info(line)
        for callback in self.callbacks:
            callback.said(line)

    def add_evaluation(self, record: dict[str, Any]) -> None:
        """Write the record of an evaluation to `metrics.jsonl`, and hand it to the callbacks."""
        self.metrics.write(record)
        for callback in self.callbacks:
            callback.evaluated(record)

    def callback_state(self) -> dict[str, Any]:
        """The state of all callbacks, for a checkpoint; all ranks call it together."""
        return {name: value for callback in self.callbacks for name, value in callback.state().items()}

    def callback_summary(self) -> dict[str, Any]:
        """The totals of all callbacks, for `summary.json`; all ranks call it together."""
        return {name: value for callback in self.callbacks for name, value in callback.summary().items()}


def build_run(checked: Checked, runtime: Runtime, notes: tuple[str, ...] = ()) -> Run:
    """Build the engine and the teacher, and restore both if the run continues; all ranks call it together.

    Args:
        checked: what the run's checks have made.
        runtime: this rank.
        notes: lines on its hosts, for those who watch the run.

    Decision: docs/decisions/0018-teacher-copied-before-averaged-after.md.
    Decision: docs/decisions/0022-models-built-whole.md.
    Decision: docs/decisions/0039-deferred-weights-at-zero-3.md.

    Raises:
        CheckpointError: the checkpoint does not fit the model or its optimizer.
    """
    recipe, student, batches = checked.recipe, checked.student, checked.batches
    frozen = checked.frozen_teacher.segmenter if checked.frozen_teacher is not None else None
    burn_in_work, work = _work(recipe, student, batches, frozen)  # before ZeRO-3 takes the weights apart
    average = copy.deepcopy(student)  # made in host memory, so that a GPU never holds both whole models
    if student.deferred is None:  # else there are no weights yet: the engine makes and shards them
        student.to(runtime.device)
    if recipe.model.batchnorm == "synchronised" and runtime.world_size > 1:
        synchronise_batchnorm(student, runtime.sum_over_ranks)
    if recipe.engine.compile:
        student.compile_blocks()
        average.compile_blocks()
        if frozen is not None and frozen.family.compiles_blocks:
            frozen.compile_blocks()
    weights = _class_weights(checked)
    thresholds = thresholds_by_class(recipe.method, checked.data.classes, student.num_classes)
    maskmatch = MaskMatch(
        student,
        recipe.method,
        recipe.run.seed,
        checked.data.ignore_index,
        None if weights is None else weights.to(runtime.device),
        threshold=torch.tensor(thresholds, dtype=torch.float64, device=runtime.device)
        if isinstance(thresholds, tuple)
        else None,
        batchnorm_frozen=recipe.model.batchnorm == "frozen",
        neighbour=Neighbour(runtime.rank % 2 == 0, runtime.of_neighbour) if runtime.world_size > 1 else None,
    )
    if recipe.engine.cuda_graphs:
        maskmatch.graphs = GraphedViews(student)
    engine = build_engine(maskmatch, student, recipe, runtime)
    teacher = build_teacher(average, engine)
    resumed = _restore(checked.checkpoint, engine, teacher) if checked.checkpoint else {}
    keeper, writer = _open_checkpoints(checked, runtime)
    run = Run(
        recipe=recipe,
        precision_reason=checked.precision_reason,
        data=checked.data,
        folder=checked.folder,
        batches=batches,
        runtime=runtime,
        student=student,
        maskmatch=maskmatch,
        engine=engine,
        teacher=teacher,
        frozen_teacher=None if frozen is None else FrozenTeacher(frozen, recipe, runtime.device),
        burn_in_work=burn_in_work,
        work=work,
        metrics=MetricsLog(checked.folder.metrics if runtime.rank == 0 else None, lambda line: run.say(line)),
        resumed=resumed,
        notes=(
            *notes,
            *(f"passed over: {line}" for line in (checked.checkpoint.passed_over if checked.checkpoint else ())),
            *(() if checked.checkpoint else student.start_notes),
            *changes(resumed, recipe, runtime.world_size),
        ),
        model=checked.model,
        frozen_facts=checked.frozen_facts,
        writer=writer,
        keeper=keeper,
        agreement=Agreement(runtime),
        end=recipe.run.steps,
    )
    return run


def _restore(checkpoint: Checkpoint, engine: Engine, teacher: StoredTeacher) -> dict[str, Any]:
    """Restore student, optimizer and teacher bit for bit, and give the contents of `state.json`.

    All ranks call it together.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    stored = StoredTensors(checkpoint.folder, checkpoint.index)
    try:
        with being_read(checkpoint.folder):
            engine.restore(stored, checkpoint.state["engine"])
            teacher.restore(stored)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}: its state does not fit this run ({type(error).__name__}: {error}); start a new run "
            "from its weights (model.pretrained)"
        ) from error
    return checkpoint.state


def _open_checkpoints(checked: Checked, runtime: Runtime) -> tuple[Keeper | None, CheckpointWriter]:
    """What keeps and writes the checkpoints of the run."""
    run, checkpoint, folder = checked.recipe.run, checked.checkpoint, checked.folder.checkpoints
    start = checkpoint.step if checkpoint else 0
    keep = Keep(run.keep_last, run.keep_every, run.keep_best)
    keeper = Keeper(folder, keep, start) if runtime.rank == 0 else None
    timeout_s = checked.recipe.engine.collective_timeout_s
    writer = CheckpointWriter(
        folder,
        runtime.rank,
        runtime.world_size,
        own_store(runtime.world_size, timeout_s),
        timeout_s,
        newest=checkpoint.folder if checkpoint else None,
        completed=keeper.tidy if keeper is not None else lambda step: None,
        agreed=lambda error: runtime.text_of(0, error),
    )
    return keeper, writer


def _class_weights(checked: Checked) -> Tensor | None:
    """float32 (classes,) weights of the labelled loss; None if all classes weigh the same."""
    method, classes = checked.recipe.method, checked.student.num_classes
    if method.class_weights == "none":
        return None
    named = weights_by_class(method, checked.data.classes, classes)
    return class_weights(checked.batches.class_pixels()) if named is None else torch.tensor(named)


def _work(recipe: Recipe, student: Segmenter, batches: TrainingBatches, teacher: Segmenter | None) -> tuple[Work, Work]:
    """What a step asks of a rank's backbone, in the burn-in and after it."""
    images = recipe.engine.micro_batch * recipe.engine.accumulation
    labelled = images if batches.labelled is not None else 0
    unlabelled = images * recipe.data.unlabelled_per_labelled if uses_unlabelled(recipe.method) else 0
    if recipe.method.views_of == "labelled" and makes_views(recipe.method):
        unlabelled = labelled
    burn_in, after = (
        step_work(student, recipe.method, recipe.data.crop_px, labelled, count, teacher=teacher)
        for count in (0, unlabelled)
    )
    return burn_in, after
