"""One run, from recipe to report: build, loop, close."""

from __future__ import annotations

import copy
import json
import logging
import math
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from maskmatch_scale import __version__
from maskmatch_scale.data.batches.loading import batches
from maskmatch_scale.data.batches.stream import Batch, TrainingStream
from maskmatch_scale.data.faults import REASONS
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.reading import ShardStream, load_index
from maskmatch_scale.engine import setup
from maskmatch_scale.engine.build import build_engine
from maskmatch_scale.engine.checkpoint import (
    check_checkpoint,
    find_checkpoint,
    load_checkpoint,
    load_stream_state,
    save_checkpoint,
)
from maskmatch_scale.engine.ema import StoredTeacher, autocast, autocast_dtype, build_teacher
from maskmatch_scale.engine.optim import base_lr
from maskmatch_scale.engine.setup import Place, Runtime
from maskmatch_scale.engine.zero import deepspeed_config
from maskmatch_scale.errors import TrainingStopped, UserError
from maskmatch_scale.evaluation.evaluate import evaluate_split
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.method.ema import ema_decay
from maskmatch_scale.method.maskmatch import PARTS, MaskMatch, class_weights, uses_unlabelled
from maskmatch_scale.method.views import Neighbour
from maskmatch_scale.models import Segmenter
from maskmatch_scale.models.batchnorm import synchronise_batchnorm
from maskmatch_scale.models.families import check_capabilities
from maskmatch_scale.models.units import visible_count
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.recipe.bases import has_unlabelled_loss
from maskmatch_scale.record.metrics import MetricsLog
from maskmatch_scale.record.progress import TrainingProgress
from maskmatch_scale.record.report import write_report
from maskmatch_scale.record.skips import Skips
from maskmatch_scale.runs.model import RunData, build_student, describe_data, window_of
from maskmatch_scale.seeds import derive_seed

log = logging.getLogger("maskmatch_scale")


def train(recipe: Recipe, resume: str | None = None) -> Path:
    """Train a recipe in this process: one rank of a launcher's job, or the only one.

    Args:
        recipe: from :func:`maskmatch_scale.recipe.load_recipe`.
        resume: `auto` (the run directory's newest checkpoint, or a new run if it has none), a path to a run or a
            checkpoint, or None for a new run.

    Returns:
        The run directory.

    Raises:
        UserError: something the user can mend, found before anything is written (a bad sample: when it is met).
        TrainingStopped: a non-finite loss.
    """
    place = Place.from_environment()
    index = load_index(recipe.data.root, recipe.data)
    data = describe_data(recipe, index)
    student = build_student(recipe, data)
    check_model(recipe, student)
    has_batchnorm = any(isinstance(module, _BatchNorm) for module in student.modules())
    precision, reason = setup.choose_precision(recipe, batchnorm=has_batchnorm)
    recipe = recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"precision": precision})})
    if recipe.engine.deepspeed_json:
        deepspeed_config(recipe, place.world_size)  # its mistakes, before anything is written
    recipe, stream = _open_stream(recipe, student.num_classes, place, index)
    if "dev" in index.streams:  # found missing now, and not at the first evaluation
        ShardStream(recipe.data.root, "dev", recipe.data, index=index)
    used = {"labelled": stream.labelled_samples, "unlabelled": stream.unlabelled_samples}
    data = describe_data(recipe, index, used)
    run = Path(recipe.run.dir)
    checkpoint = _checkpoint_to_resume(run, resume)
    if checkpoint is not None:
        check_checkpoint(checkpoint, recipe, place.world_size)
        stream.resume(load_stream_state(checkpoint))
    runtime = setup.start(place, recipe.engine)
    _check_agreement(runtime, recipe, stream, checkpoint)
    if recipe.data.rare_class_crops or recipe.method.class_weights != "none":
        stream.count_class_pixels(runtime.sum_over_ranks)  # now, once: loader processes inherit it
    if runtime.rank == 0:
        _open_run_directory(
            run, recipe, data, continued=checkpoint is not None and run.resolve() in checkpoint.resolve().parents
        )
    runtime.barrier()
    with _rank_log(run, runtime):
        _Run(recipe, data, stream, student, runtime, run, reason).train(checkpoint)
    return run


def _open_stream(recipe: Recipe, num_classes: int, place: Place, index: ShardIndex) -> tuple[Recipe, TrainingStream]:
    """The training stream, and the recipe with the number of its steps."""

    def stream_of(recipe: Recipe) -> TrainingStream:
        unlabelled = uses_unlabelled(recipe.method)
        return TrainingStream(recipe, num_classes, place.rank, place.world_size, unlabelled=unlabelled, index=index)

    stream = stream_of(recipe)
    labelled = stream.unlabelled is None
    samples = stream.labelled_samples if labelled else stream.unlabelled_samples
    images = recipe.engine.micro_batch * recipe.engine.accumulation * place.world_size
    images *= 1 if labelled else recipe.data.unlabelled_per_labelled
    counted = recipe.with_steps(samples, images, labelled=labelled)
    return counted, stream if counted is recipe else stream_of(counted)


def _check_agreement(runtime: Runtime, recipe: Recipe, stream: TrainingStream, checkpoint: Path | None) -> None:
    """Refuse ranks that are about to train different runs: a machine has another recipe, other shards, no checkpoint.

    Raises:
        UserError: on every rank.
    """
    step = int(checkpoint.name.removeprefix("step-")) if checkpoint is not None else 0
    data = recipe.data.model_copy(update={"cache_dir": None})
    facts = {
        "recipe": repr(recipe.model_copy(update={"data": data})),
        "checkpoint to continue from (--resume)": str(step),
        "shards, or another place in them": json.dumps(stream.state(step)),
    }
    known = torch.zeros(runtime.world_size, len(facts), dtype=torch.int64, device=runtime.device)
    known[runtime.rank] = torch.tensor([derive_seed(0, fact) for fact in facts.values()])
    known = runtime.sum_over_ranks(known)
    for number, what in enumerate(facts):
        differing = (known[:, number] != known[0, number]).nonzero()
        if len(differing):
            error = UserError(
                f"rank {int(differing[0])} has another {what} than rank 0; every machine needs the same files under "
                "the same paths (run.dir on a disk that all of them see)"
            )
            error.on_all_ranks = True
            raise error


def check_model(recipe: Recipe, student: Segmenter) -> None:
    """Refuse what this model cannot do.

    Raises:
        UserError: names the key and what fits.
    """
    try:
        check_capabilities(
            recipe.model.backbone, compile_blocks=recipe.engine.compile, layer_decay=recipe.optim.layer_decay
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        if recipe.method.mask.keep is not None:
            visible_count(student.unit_grid(*recipe.data.crop_px), recipe.method.mask.keep)
        student.check_size(*recipe.data.crop_px)
    except ValueError as error:
        raise UserError(f"data.crop_px={list(recipe.data.crop_px)}: {error}") from None


@dataclass
class _Run:
    """A run on one rank, with everything built that it needs."""

    recipe: Recipe
    data: RunData
    stream: TrainingStream
    student: Segmenter
    runtime: Runtime
    folder: Path
    precision_reason: str

    def train(self, checkpoint: Path | None) -> None:
        """Build the engine and the teacher, loop over the steps, close."""
        recipe, runtime = self.recipe, self.runtime
        average = copy.deepcopy(self.student)  # in host memory: a GPU never holds the two of them whole at once
        self.student.to(runtime.device)
        if recipe.model.batchnorm == "synchronised" and runtime.world_size > 1:
            synchronise_batchnorm(self.student, runtime.sum_over_ranks)
        if recipe.engine.compile:
            self.student.compile_blocks()
            average.compile_blocks()
        weights = class_weights(self.stream.class_pixels()) if recipe.method.class_weights != "none" else None
        if weights is not None:
            weights = weights.to(runtime.device)
        self.maskmatch = MaskMatch(
            self.student,
            recipe.method,
            recipe.run.seed,
            self.data.ignore_index,
            weights,
            batchnorm_frozen=recipe.model.batchnorm == "frozen",
            neighbour=Neighbour(runtime.rank % 2 == 0, runtime.of_neighbour) if runtime.world_size > 1 else None,
        )
        self.engine = build_engine(self.maskmatch, self.student, recipe, runtime)
        self.teacher: StoredTeacher = build_teacher(average, self.engine)
        self.metrics = MetricsLog(self.folder / "metrics.jsonl" if runtime.rank == 0 else None)
        dev = self.stream.index.streams.get("dev")
        self.evaluates = dev is not None and dev.labelled
        self.left_out = 0
        self.last_checkpoint: Path | None = checkpoint
        state = load_checkpoint(checkpoint, self.engine, self.teacher, runtime) if checkpoint else {}
        start = int(state.get("step", 0))
        skipped = self.folder / "skipped" / f"rank-{runtime.rank}.jsonl"
        self.skips = Skips(skipped, REASONS, recipe.data.max_bad_share, state)
        self._log_start(start)

        self.spent_before = {name: float(state.get(name, 0.0)) for name in ("seconds", "cpu_s")}
        self.began, self.cpu_began = time.monotonic(), _cpu_s()
        accumulation, steps = recipe.engine.accumulation, recipe.run.steps
        loader = batches(
            self.stream, start * accumulation, steps * accumulation, pin_memory=runtime.device.type == "cuda"
        )
        with TrainingProgress(steps, start, shown=runtime.rank == 0) as self.progress:
            for step in range(start, steps):
                self.progress.phase(cheap=step < recipe.burn_in_steps)
                self._step(step, loader)
                self.progress.step(step + 1)
                self._after(step + 1)
        loader.close()  # ends the loader processes, whose CPU time counts only then
        spent = self._spent()
        if runtime.rank == 0:
            self._close(spent)

    def _step(self, step: int, loader: Iterator[Batch]) -> None:
        """One optimizer step: all views of all micro-batches, losses over the global batch, teacher last."""
        began = time.monotonic()
        device, recipe = self.runtime.device, self.recipe
        # Dropout and drop path draw from torch's own generator, which a restart must find as it was.
        torch.manual_seed(derive_seed(recipe.run.seed, "step", step, self.runtime.rank))
        self.maskmatch.train()
        prepared = []
        waited = 0.0
        skipped = torch.zeros(len(REASONS), dtype=torch.float64)
        for _ in range(recipe.engine.accumulation):
            asked = time.monotonic()
            batch = next(loader)
            waited += time.monotonic() - asked
            skipped += torch.tensor(self.skips.add(step + 1, batch.skipped), dtype=torch.float64)
            prepared.append(self.maskmatch.prepare(batch.to(device)))

        local = torch.stack([self.maskmatch.denominators(p) for p in prepared]).sum(0)
        pixels = self.runtime.sum_over_ranks(local)
        # DeepSpeed averages gradients over ranks and micro-batches; the losses are means over all their pixels.
        scale = self.runtime.world_size * recipe.engine.accumulation / pixels.clamp(min=1)
        sums = torch.zeros(5 + len(REASONS), dtype=torch.float64, device=device)
        sums[5:] = skipped.to(device, non_blocking=True)
        teacher_times = []
        for micro in prepared:
            stop = self.runtime.stopwatch()
            pseudo = self.maskmatch.pseudo_label(micro, self.teacher)
            teacher_times.append(stop())
            loss, parts = self.engine.forward(micro, pseudo, scale)
            sums[:3] += parts
            if pseudo is not None and micro.unlabelled is not None:
                valid = micro.unlabelled.weak.valid
                sums[3:5] += torch.stack([(pseudo.confident & valid).sum(), valid.sum()])
            left_out = bool(recipe.run.max_nonfinite_steps) and self._not_finite(sums)
            if left_out:
                self.engine.leave_out()
            else:
                self.engine.backward(loss)
        if not left_out:
            self.engine.step(step)
        stop = self.runtime.stopwatch()
        if not left_out and not self.engine.skipped:
            self.teacher.update(ema_decay(step + 1, recipe.method.ema_decay))
        times = {"teacher_s": lambda: sum(time_s() for time_s in teacher_times), "ema_s": stop()}
        sums = self.runtime.sum_over_ranks(sums)
        self._record(step, prepared[0].unlabelled is not None, sums, pixels, began, waited, times, left_out=left_out)
        if left_out:
            self._count_left_out()

    def _record(
        self,
        step: int,
        unlabelled: bool,
        sums: Tensor,
        pixels: Tensor,
        began: float,
        waited: float,
        times: dict[str, Callable[[], float]],
        *,
        left_out: bool,
    ) -> None:
        """Keep the step's figures; nothing here waits for the device."""
        method, engine = self.recipe.method, self.recipe.engine
        losses = sums[:3] / pixels.clamp(min=1)
        total = losses[0] + method.unlabelled_weight * losses[1] + method.mask.weight * losses[2]
        figures: dict[str, float | bool | None] = dict.fromkeys(("loss", *PARTS))
        on_device = {"loss": total}
        if self.stream.labelled is not None:
            on_device["loss_x"] = losses[0]
        if unlabelled and has_unlabelled_loss(method.base):
            on_device["loss_u"] = losses[1]
        if unlabelled and method.mask.keep is not None:
            on_device["loss_m"] = losses[2]
        figures["lr"] = self.engine.lr(step)
        norm = None if left_out else self.engine.grad_norm
        figures["grad_norm"] = norm if isinstance(norm, float) else None
        if isinstance(norm, Tensor):
            on_device["grad_norm"] = norm.detach()
        figures["coverage"] = None
        if unlabelled:
            on_device["coverage"] = sums[3] / sums[4].clamp(min=1)
        step_s = time.monotonic() - began
        labelled = self.stream.labelled is not None
        a_rank = engine.micro_batch * (labelled + unlabelled * self.recipe.data.unlabelled_per_labelled)
        images = a_rank * engine.accumulation * self.runtime.world_size
        self.skips.read += images
        figures["images_per_s"] = images / step_s
        figures["data_wait_s"] = waited
        figures["step_s"] = step_s
        if left_out:
            figures["left_out"] = True
        elif self.engine.skipped:
            figures["overflow"] = True
        on_device |= {f"skipped/{reason}": count for reason, count in zip(REASONS, sums[5:], strict=True)}
        self.metrics.train(step + 1, figures, on_device, times)

    def _after(self, done: int) -> None:
        """What is due after ``done`` steps: a line of progress, an evaluation, a checkpoint."""
        run, last = self.recipe.run, done == self.recipe.run.steps
        evaluation_due = last or (run.evaluate_every and done % run.evaluate_every == 0)
        checkpoint_due = last or (run.checkpoint_every and done % run.checkpoint_every == 0)
        if done % run.log_every == 0 or evaluation_due or checkpoint_due:
            self._flush()
        too_many = self.skips.too_many
        if checkpoint_due or too_many:
            self.last_checkpoint = save_checkpoint(
                self.folder,
                done,
                self._spent() | self.skips.counts,
                self.engine,
                self.teacher,
                self.runtime,
                self.stream.state(done),
            )
        if too_many:
            raise TrainingStopped(f"step {done}: {too_many}")
        if evaluation_due:
            for weights in ("ema", "student") if last else ("ema",):
                self._evaluate(done, weights)

    def _flush(self) -> list[dict[str, Any]]:
        """Write what waits, show the newest, and stop the run if a step that counted was not finite."""
        records = self.metrics.flush()
        for record in records:
            if record.get("left_out"):
                continue
            # A gradient can overflow where the loss did not: the weights are gone all the same, but for fp16, where
            # such a step is not taken and the loss scale falls.
            norm = 0.0 if record.get("overflow") else record["grad_norm"] or 0.0
            if not math.isfinite(record["loss"] + norm):
                raise TrainingStopped(self._nonfinite(record["step"], record))
        if records:
            self.progress.figures(records[-1])
            log.info("%s", json.dumps(records[-1]))
            before = self.skips.skipped
            self.skips.count(records)
            if self.skips.skipped and not before:
                self.progress.say(f"a bad sample was skipped; {self.skips.path.parent} lists all that are")
        return records

    def _not_finite(self, sums: Tensor) -> bool:
        """Whether this step's loss is not finite on any rank; costs a device sync."""
        return not bool(self.runtime.sum_over_ranks(sums).isfinite().all())

    def _count_left_out(self) -> None:
        self.left_out += 1
        record = self._flush()[-1]
        if self.left_out > self.recipe.run.max_nonfinite_steps:
            raise TrainingStopped(self._nonfinite(record["step"], record))
        log.warning("step %d left out: the loss is not finite", record["step"])

    def _nonfinite(self, step: int, record: dict[str, Any]) -> str:
        what = "gradient" if math.isfinite(record["loss"]) else "loss"
        shown = ", ".join(f"{name}={record[name]}" for name in (*PARTS, "grad_norm") if record.get(name) is not None)
        if self.last_checkpoint:
            remedy = (
                f"the last good checkpoint is {self.last_checkpoint}: continue with --resume {self.last_checkpoint}"
            )
        else:
            remedy = "there is no checkpoint before it"
        return f"step {step}: the {what} is not finite ({shown}); {remedy}. Lower optim.lr or set optim.clip_norm"

    def _evaluate(self, done: int, weights: str) -> None:
        """Evaluate on `dev`, which serves the choice of hyper-parameters; `val` is left to `maskmatch evaluate`."""
        if not self.evaluates:
            return
        matrix = ConfusionMatrix(self.student.num_classes, self.data.ignore_index)
        self.student.eval()
        # A 16-bit student has 16-bit weights, which take no autocast; the teacher sees to its own.
        with autocast(self.runtime.device, None if _has_masters(self.recipe) else autocast_dtype(self.recipe)):
            evaluate_split(
                self.teacher if weights == "ema" else self.student,
                self.recipe.data,
                "dev",
                window_of(self.recipe, self.student, self.runtime.device),
                matrix,
                (self.runtime.rank, self.runtime.world_size),
                self.runtime.sum_over_ranks,
            )
        figures = {"miou": matrix.miou(), "pixel_accuracy": matrix.pixel_accuracy()}
        self.metrics.write({"step": done, "kind": "eval", "split": "dev", "weights": weights, **figures})
        line = (
            f"step {done}: dev mIoU {figures['miou']:.4f}, pixel accuracy {figures['pixel_accuracy']:.4f} ({weights})"
        )
        self.progress.say(line)
        log.info(line)

    def _log_start(self, start: int) -> None:
        engine, place = self.recipe.engine, self.runtime.place
        parameters = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in self.student.parameters())
        kind = f"ZeRO-{engine.zero_stage}" if engine.library == "deepspeed" else "accelerate"
        lines = [
            f"maskmatch_scale {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
            f"rank {place.rank} of {place.world_size} on {self.runtime.device}, {self.runtime.threads} CPU threads",
            f"{self.recipe.model.backbone}: {parameters / 1e6:.2f} M parameters, {kind}, "
            f"{engine.precision} ({self.precision_reason})",
            f"{self.stream.labelled_samples} labelled samples, {self.stream.unlabelled_samples} unlabelled, from step "
            f"{start}",
        ]
        if self.recipe.optim.lr_reference_batch:
            lines.append(
                f"peak learning rate {base_lr(self.recipe, place.world_size):.3g}: optim.lr={self.recipe.optim.lr:g}, "
                f"scaled from {self.recipe.optim.lr_reference_batch} to "
                f"{engine.micro_batch * engine.accumulation * place.world_size} labelled images a step"
            )
        unlabelled = engine.micro_batch * self.recipe.data.unlabelled_per_labelled
        if place.world_size == unlabelled == 1 and self.recipe.method.strong_view.cutmix_probability:
            lines.append("no CutMix: one process with one unlabelled image has no other; raise engine.micro_batch")
        for line in lines:
            log.info(line)
        if place.rank == 0:
            print("\n".join(lines), flush=True)  # noqa: T201

    def _spent(self) -> dict[str, float]:
        """Wall seconds, and CPU seconds of all ranks, since the run's first start; all ranks call it together."""
        cpu_s = torch.tensor([_cpu_s() - self.cpu_began], dtype=torch.float64, device=self.runtime.device)
        return {
            "seconds": self.spent_before["seconds"] + time.monotonic() - self.began,
            "cpu_s": self.spent_before["cpu_s"] + float(self.runtime.sum_over_ranks(cpu_s)),
        }

    def _close(self, spent: dict[str, float]) -> None:
        summary = {
            **spent,
            "world_size": self.runtime.world_size,
            "device": str(self.runtime.device),
            "versions": {"maskmatch_scale": __version__, "torch": torch.__version__},
            "steps_left_out": self.left_out,
            **self.skips.counts,
        }
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1))
        print(f"report: {write_report([self.folder])}", flush=True)  # noqa: T201


def _has_masters(recipe: Recipe) -> bool:
    """Whether the student's weights are 16-bit copies of fp32 masters."""
    return recipe.engine.library == "deepspeed" and recipe.engine.precision in ("bf16", "fp16")


def _checkpoint_to_resume(run: Path, resume: str | None) -> Path | None:
    if resume is None:
        return None
    if resume == "auto":
        return find_checkpoint(run) if (run / "checkpoints" / "latest").is_file() else None
    return find_checkpoint(Path(resume))


def _open_run_directory(run: Path, recipe: Recipe, data: RunData, *, continued: bool) -> None:
    """Make the run directory; another run in its place is moved aside, never overwritten."""
    if not continued and (run / "recipe.yaml").exists():
        number = next(n for n in range(1, 10_000) if not run.with_name(f"{run.name}.previous-{n}").exists())
        aside = run.with_name(f"{run.name}.previous-{number}")
        run.rename(aside)
        print(f"{run} held an older run: moved to {aside}", flush=True)  # noqa: T201
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(recipe.to_yaml())
    (run / "data.json").write_text(data.model_dump_json(indent=1))
    if recipe.engine.deepspeed_json:
        shutil.copyfile(recipe.engine.deepspeed_json, run / "deepspeed.json")


class _rank_log:  # noqa: N801
    """`RUN/log/rank-N.txt` while the run is open; an error that ends the run is written there with its traceback."""

    def __init__(self, run: Path, runtime: Runtime) -> None:
        self.path = run / "log" / f"rank-{runtime.rank}.txt"

    def __enter__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.handler = logging.FileHandler(self.path)
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(self.handler)
        log.setLevel(logging.INFO)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            log.error("the run ended with an error", exc_info=error)
            error.logged_in = str(self.path)  # type: ignore[attr-defined]
        log.removeHandler(self.handler)
        self.handler.close()


def _cpu_s() -> float:
    """CPU seconds of this process and of the loader processes that have ended."""
    usages: Sequence[resource.struct_rusage] = [
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
