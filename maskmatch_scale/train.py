"""One run, from recipe to report: build, loop, close."""

from __future__ import annotations

import copy
import json
import logging
import math
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from maskmatch_scale import __version__
from maskmatch_scale.data.shards import ShardIndex
from maskmatch_scale.data.stream import Batch, TrainingStream, batches
from maskmatch_scale.engine import setup
from maskmatch_scale.engine.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from maskmatch_scale.engine.ema import StoredTeacher, build_teacher
from maskmatch_scale.engine.setup import Place, Runtime
from maskmatch_scale.engine.zero import ZeroEngine
from maskmatch_scale.evaluation.evaluate import evaluate_split
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.method.maskmatch import PARTS, MaskMatch, class_weights, uses_unlabelled
from maskmatch_scale.method.teacher import ema_decay
from maskmatch_scale.models import Segmenter
from maskmatch_scale.models.units import visible_count
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.record.metrics import MetricsLog
from maskmatch_scale.record.progress import TrainingProgress
from maskmatch_scale.record.report import write_report
from maskmatch_scale.seeds import derive_seed
from maskmatch_scale.trained import build_student, window_of

log = logging.getLogger("maskmatch_scale")


class TrainingStopped(RuntimeError):  # noqa: N818 - not an error of the program
    """The run stopped itself; the message says at which step, why, and what it can be continued from."""


def train(recipe: Recipe, resume: str | None = None) -> Path:
    """Train a recipe in this process: one rank of a launcher's job, or the only one.

    Args:
        recipe: from :func:`maskmatch_scale.recipe.load_recipe`.
        resume: `auto` (the run directory's newest checkpoint, or a new run if it has none), a path to a run or a
            checkpoint, or None for a new run.

    Returns:
        The run directory.

    Raises:
        ValueError: something the user can mend, found before anything is written (bad data: when it is met).
        TrainingStopped: a non-finite loss.
    """
    place = Place.from_environment()
    index = ShardIndex.load(recipe.data.root)
    student = build_student(recipe, index)
    check_model(recipe, student)
    unlabelled = uses_unlabelled(recipe.method)
    stream = TrainingStream(recipe, student.num_classes, place.rank, place.world_size, unlabelled=unlabelled)
    if unlabelled or recipe.data.rare_class_crops or recipe.method.class_weights != "none":
        stream.class_pixels()
    run = Path(recipe.run.dir)
    checkpoint = _checkpoint_to_resume(run, resume)
    runtime = setup.start(place, recipe.engine.threads)
    if runtime.rank == 0:
        _open_run_directory(run, recipe, fresh=checkpoint is None)
    runtime.barrier()
    with _rank_log(run, runtime):
        _Run(recipe, index, stream, student, runtime, run).train(checkpoint)
    return run


def check_model(recipe: Recipe, student: Segmenter) -> None:
    """Refuse what this model cannot do.

    Raises:
        ValueError: names the key and what fits.
    """
    try:
        if recipe.method.mask.keep is not None:
            visible_count(student.unit_grid(*recipe.data.crop_px), recipe.method.mask.keep)
        student.check_size(*recipe.data.crop_px)
    except ValueError as error:
        raise ValueError(f"data.crop_px={list(recipe.data.crop_px)}: {error}") from None
    if recipe.engine.precision == "bf16" and any(isinstance(m, _BatchNorm) for m in student.modules()):
        raise ValueError(
            f"engine.precision=bf16: the head {recipe.model.head or 'segformer'!r} has a BatchNorm, whose "
            "buffers DeepSpeed leaves in fp32; use engine.precision=autocast-bf16, or a head without one"
        )


@dataclass
class _Run:
    """A run on one rank, with everything built that it needs."""

    recipe: Recipe
    index: ShardIndex
    stream: TrainingStream
    student: Segmenter
    runtime: Runtime
    folder: Path

    def train(self, checkpoint: Path | None) -> None:
        """Build the engine and the teacher, loop over the steps, close."""
        recipe, runtime = self.recipe, self.runtime
        self.student.to(runtime.device)
        average = copy.deepcopy(self.student)
        weights = class_weights(self.stream.class_pixels()) if recipe.method.class_weights != "none" else None
        if weights is not None:
            weights = weights.to(runtime.device)
        self.maskmatch = MaskMatch(
            self.student,
            recipe.method,
            recipe.run.seed,
            self.index.ignore_index,
            weights,
            batchnorm_frozen=recipe.model.batchnorm == "frozen",
        )
        self.engine = ZeroEngine(self.maskmatch, self.student, recipe, runtime)
        self.teacher: StoredTeacher = build_teacher(average, self.student, recipe.engine)
        self.metrics = MetricsLog(self.folder / "metrics.jsonl" if runtime.rank == 0 else None)
        self.left_out = 0
        self.last_checkpoint: Path | None = checkpoint
        start = load_checkpoint(checkpoint, self.engine, self.teacher, runtime) if checkpoint else 0
        self._log_start(start)

        began, cpu_began = time.monotonic(), _cpu_s()
        accumulation, steps = recipe.engine.accumulation, recipe.run.steps
        loader = batches(
            self.stream, start * accumulation, steps * accumulation, pin_memory=runtime.device.type == "cuda"
        )
        with TrainingProgress(steps, start, shown=runtime.rank == 0) as self.progress:
            for step in range(start, steps):
                self.progress.phase("burn-in" if step < recipe.burn_in_steps else "all losses")
                self._step(step, loader)
                self.progress.step(step + 1)
                self._after(step + 1)
        seconds, cpu_s = time.monotonic() - began, _cpu_s() - cpu_began
        cpu_total = float(runtime.sum_over_ranks(torch.tensor([cpu_s], dtype=torch.float64, device=runtime.device)))
        if runtime.rank == 0:
            self._close(seconds, cpu_total)

    def _step(self, step: int, loader: Iterator[Batch]) -> None:
        """One optimizer step: all views of all micro-batches, losses over the global batch, teacher last."""
        began = time.monotonic()
        device, recipe = self.runtime.device, self.recipe
        # Dropout and drop path draw from torch's own generator, which a restart must find as it was.
        torch.manual_seed(derive_seed(recipe.run.seed, "step", step, self.runtime.rank))
        self.maskmatch.train()
        prepared = []
        waited = 0.0
        for _ in range(recipe.engine.accumulation):
            asked = time.monotonic()
            batch = next(loader)
            waited += time.monotonic() - asked
            prepared.append(self.maskmatch.prepare(batch.to(device)))

        local = torch.stack([self.maskmatch.denominators(p) for p in prepared]).sum(0)
        pixels = self.runtime.sum_over_ranks(local)
        # DeepSpeed averages gradients over ranks and micro-batches; the losses are means over all their pixels.
        scale = self.runtime.world_size * recipe.engine.accumulation / pixels.clamp(min=1)
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        for micro in prepared:
            pseudo = self.maskmatch.pseudo_label(micro, self.teacher)
            loss, parts = self.engine.forward(micro, pseudo, scale)
            sums[:3] += parts
            if pseudo is not None and micro.unlabelled is not None:
                valid = micro.unlabelled.weak.valid
                sums[3:] += torch.stack([(pseudo.confident & valid).sum(), valid.sum()])
            if recipe.run.max_nonfinite_steps and self._leave_out(step, parts):
                return
            self.engine.backward(loss)
        self.engine.step(step)
        self.teacher.update(ema_decay(step + 1, recipe.method.ema_decay))
        self._record(step, prepared[0].unlabelled is not None, self.runtime.sum_over_ranks(sums), pixels, began, waited)

    def _record(self, step: int, unlabelled: bool, sums: Tensor, pixels: Tensor, began: float, waited: float) -> None:
        """Keep the step's figures; nothing here waits for the device."""
        method, engine = self.recipe.method, self.recipe.engine
        losses = sums[:3] / pixels.clamp(min=1)
        total = losses[0] + method.unlabelled_weight * losses[1] + method.mask.weight * losses[2]
        figures: dict[str, float | None] = dict.fromkeys(("loss", *PARTS))
        on_device = {"loss": total, "loss_x": losses[0]}
        if unlabelled and method.base != "supervised":
            on_device["loss_u"] = losses[1]
        if unlabelled and method.mask.keep is not None:
            on_device["loss_m"] = losses[2]
        figures["lr"] = self.engine.lr(step)
        norm = self.engine.grad_norm
        figures["grad_norm"] = norm if isinstance(norm, float) else None
        if isinstance(norm, Tensor):
            on_device["grad_norm"] = norm.detach()
        figures["coverage"] = None
        if unlabelled:
            on_device["coverage"] = sums[3] / sums[4].clamp(min=1)
        step_s = time.monotonic() - began
        a_rank = engine.micro_batch * (1 + unlabelled * self.recipe.data.unlabelled_per_labelled)
        figures["images_per_s"] = a_rank * engine.accumulation * self.runtime.world_size / step_s
        figures["data_wait_s"] = waited
        figures["step_s"] = step_s
        self.metrics.train(step + 1, figures, on_device)

    def _after(self, done: int) -> None:
        """What is due after ``done`` steps: a line of progress, an evaluation, a checkpoint."""
        run, last = self.recipe.run, done == self.recipe.run.steps
        evaluation_due = last or (run.evaluate_every and done % run.evaluate_every == 0)
        checkpoint_due = last or (run.checkpoint_every and done % run.checkpoint_every == 0)
        if done % run.log_every == 0 or evaluation_due or checkpoint_due:
            self._flush()
        if evaluation_due:
            for weights in ("ema", "student") if last else ("ema",):
                self._evaluate(done, weights)
        if checkpoint_due:
            self.last_checkpoint = save_checkpoint(self.folder, done, self.engine, self.teacher, self.runtime)

    def _flush(self) -> None:
        records = self.metrics.flush()
        for record in records:
            if not math.isfinite(record["loss"]):
                raise TrainingStopped(self._nonfinite(record["step"], record))
        if records:
            self.progress.figures(records[-1])
            log.info("%s", json.dumps(records[-1]))

    def _leave_out(self, step: int, parts: Tensor) -> bool:
        """Whether this step's loss is non-finite on any rank and is left out; costs a device sync."""
        parts = self.runtime.sum_over_ranks(parts.double())
        if bool(parts.isfinite().all()):
            return False
        self.left_out += 1
        if self.left_out > self.recipe.run.max_nonfinite_steps:
            raise TrainingStopped(self._nonfinite(step + 1, dict(zip(PARTS, parts.tolist(), strict=True))))
        log.warning("step %d left out: non-finite loss %s", step + 1, parts.tolist())
        return True

    def _nonfinite(self, step: int, losses: dict[str, float]) -> str:
        shown = ", ".join(f"{name}={losses[name]}" for name in PARTS if losses.get(name) is not None)
        if self.last_checkpoint:
            remedy = (
                f"the last good checkpoint is {self.last_checkpoint}: continue with --resume {self.last_checkpoint}"
            )
        else:
            remedy = "there is no checkpoint before it"
        return f"step {step}: the loss is not finite ({shown}); {remedy}. Lower optim.lr or set optim.clip_norm"

    def _evaluate(self, done: int, weights: str) -> None:
        """Evaluate on `dev`, which serves the choice of hyper-parameters; `val` is left to `maskmatch evaluate`."""
        if "dev" not in self.index.streams:
            return
        matrix = ConfusionMatrix(self.student.num_classes, self.index.ignore_index)
        self.student.eval()
        evaluate_split(
            self.teacher if weights == "ema" else self.student,
            self.recipe.data.root,
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
        lines = (
            f"maskmatch_scale {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
            f"rank {place.rank} of {place.world_size} on {self.runtime.device}, {self.runtime.threads} CPU threads",
            f"{self.recipe.model.backbone}: {parameters / 1e6:.2f} M parameters, ZeRO-{engine.zero_stage}, "
            f"{engine.precision} (the recipe's engine.precision)",
            f"{len(self.stream.drawn)} labelled samples, "
            f"{len(self.stream.unlabelled) if self.stream.unlabelled else 0} unlabelled, from step {start}",
        )
        for line in lines:
            log.info(line)
        if place.rank == 0:
            print("\n".join(lines), flush=True)  # noqa: T201

    def _close(self, seconds: float, cpu_s: float) -> None:
        summary = {
            "seconds": seconds,
            "cpu_s": cpu_s,
            "world_size": self.runtime.world_size,
            "device": str(self.runtime.device),
            "versions": {"maskmatch_scale": __version__, "torch": torch.__version__},
            "steps_left_out": self.left_out,
        }
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1))
        print(f"report: {write_report([self.folder])}", flush=True)  # noqa: T201


def _checkpoint_to_resume(run: Path, resume: str | None) -> Path | None:
    if resume is None:
        return None
    if resume == "auto":
        return find_checkpoint(run) if (run / "checkpoints" / "latest").is_file() else None
    return find_checkpoint(Path(resume))


def _open_run_directory(run: Path, recipe: Recipe, *, fresh: bool) -> None:
    """Make the run directory; an older run in its place is moved aside, never overwritten."""
    if fresh and (run / "recipe.yaml").exists():
        number = next(n for n in range(1, 10_000) if not run.with_name(f"{run.name}.previous-{n}").exists())
        aside = run.with_name(f"{run.name}.previous-{number}")
        run.rename(aside)
        print(f"{run} held an older run: moved to {aside}", flush=True)  # noqa: T201
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(recipe.to_yaml())


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
        log.removeHandler(self.handler)
        self.handler.close()


def _cpu_s() -> float:
    """CPU seconds of this process and of the loader processes that have ended."""
    usages: Sequence[resource.struct_rusage] = [
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
