"""One rank of engine_overhead, started by the deepspeed launcher: `--module benchmarks.engine_overhead.worker FILE`.

FILE holds the options of the command line, `result` the file that rank 0 writes: timings, teachers and memory as rows.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from benchmarks.engine_overhead.states import (
    BEFORE_STEP,
    GRADIENTS,
    CollectiveBytes,
    formula,
    formula_text,
    nbytes_beside,
    storages,
    work_space,
)
from benchmarks.engine_overhead.variants import (
    AUTOCAST,
    BF16,
    FP32,
    Trainer,
    Variant,
    ZeroTrainer,
    build_batch,
    build_recipe,
    build_student,
    build_trainer,
)
from maskmatch_scale.device_peaks import peak_tflops
from maskmatch_scale.engine import setup
from maskmatch_scale.engine.ema import build_teacher
from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.protocol import StoredTeacher
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.models.cost import encoder_train_macs

WARM_UP = 3
"""Steps of every variant before anything is timed; weights are compared after them."""
TOLERANCE = {"fp32": 0.01, "autocast-bf16": 0.05, "bf16": 0.25}
"""Largest distance from DDP's weights after the warm-up, as a share of the distance that DDP's have moved.

bf16 weights are compared with DDP's fp32 weights under autocast. AdamW's first steps are near ±lr whatever the
gradient's size, so a weight whose gradient is mostly rounding moves at random: hence the wide limit. A control shows
that the check can still fail: ranks that do not communicate must be at least twice as far away.
"""
DECAY = 0.996
BUCKETS = 64
"""While memory is measured, DeepSpeed's buckets hold 1/64 of the parameters. Their bytes are subtracted (`buckets_mb`),
and so are gradients that still lie in them; the default of 5e8 elements would hold all gradients.
"""


class Clock:
    """Wall seconds and CPU seconds of calls on this rank. Each call begins at a barrier of all ranks."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.entries: dict[str, list[tuple[float, float]]] = {}

    def time(self, name: str, call: Callable[[], object]) -> None:
        """Call once and note how long it took on this rank."""
        dist.barrier()
        wall, cpu = self._now()
        call()
        wall_after, cpu_after = self._now()
        self.entries.setdefault(name, []).append((wall_after - wall, cpu_after - cpu))

    def over_ranks(self) -> dict[str, tuple[list[float], list[float]]]:
        """A round's wall time of the slowest rank, and its CPU time summed over ranks; a collective."""
        ranks: list[Any] = [None] * self._runtime.world_size
        dist.all_gather_object(ranks, self.entries)
        rounds = {name: list(zip(*(rank[name] for rank in ranks))) for name in self.entries}
        return {
            name: ([max(w for w, _ in entry) for entry in entries], [sum(c for _, c in entry) for entry in entries])
            for name, entries in rounds.items()
        }

    def _now(self) -> tuple[float, float]:
        if self._runtime.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


class Bench:
    """The measurements, on one rank."""

    def __init__(self, options: dict[str, Any], runtime: Runtime, folder: Path) -> None:
        self.options = options
        self.runtime = runtime
        self.folder = folder

    def family(self, variants: Sequence[Variant]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Build all variants, compare their weights with DDP's, time them in turns; rows of steps and of teachers."""
        batch = build_batch(self.options, self.runtime, self.options["batch"])
        built: dict[Variant, tuple[Trainer, StoredTeacher | None]] = {}
        apart: dict[Variant, float] = {}
        for variant in variants:
            built[variant] = self._build(variant)
            for number in range(WARM_UP):
                self._step(built[variant][0], batch, number)
        weights = {variant: _flat(trainer.weights(keep=True)) for variant, (trainer, _) in built.items()}
        alone = Variant("alone", variants[0].precision)
        control, _ = self._build(alone)
        start = _flat(control.weights(keep=True))
        if self.runtime.world_size > 1:  # one rank has nobody to communicate with
            for number in range(WARM_UP):
                self._step(control, batch, number)
            weights[alone] = _flat(control.weights(keep=True))
        reference = weights[variants[0]]
        moved = (reference - start).norm()
        for variant, vector in weights.items():
            apart[variant] = float((vector - reference).norm() / moved)
        self._check(apart)

        clock, order, done = Clock(self.runtime), random.Random(0), WARM_UP
        for round_ in range(self.options["rounds"] + 1):
            if round_ == 1:
                clock.entries.clear()  # the first round is a warm-up for the teachers' update, which has not run before
            for variant in order.sample(list(built), len(built)):
                trainer, teacher = built[variant]
                clock.time(f"step {variant.name}", lambda: self._step(trainer, batch, done))  # noqa: B023
                if teacher is not None:
                    clock.time(f"ema {variant.name}", lambda: teacher.update(DECAY))  # noqa: B023
            done += 1
        times = clock.over_ranks()
        steps = [self._step_row(variant, times, apart[variant], apart.get(alone)) for variant in built]
        teachers = [
            self._teacher_row(variant, teacher, times, batch[0])
            for variant, (_, teacher) in built.items()
            if teacher is not None
        ]
        for trainer, _ in built.values():
            _release(trainer)
        return steps, teachers

    def _build(self, variant: Variant) -> tuple[Trainer, StoredTeacher | None]:
        """A variant with a model of its own. Under our engine it has a teacher, a copy as in the training loop."""
        recipe = build_recipe(variant, self.options, self.folder)
        student = build_student(self.options, self.options["backbone"], self.runtime.device)
        trainer = build_trainer(variant, student, recipe, self.runtime)
        if not isinstance(trainer, ZeroTrainer):
            return trainer, None
        average = build_student(self.options, self.options["backbone"], self.runtime.device)
        return trainer, build_teacher(average, trainer.engine)

    def _step(self, trainer: Trainer, batch: tuple[Tensor, Tensor], number: int) -> None:
        trainer.backward(*batch)
        trainer.update(number)

    def _check(self, apart: dict[Variant, float]) -> None:
        """Stop on every rank if a variant has not done the same work as DDP."""
        shown = ", ".join(f"{variant.name}: {value:.2g}" for variant, value in apart.items())
        if self.runtime.rank == 0:
            print(f"apart from DDP after {WARM_UP} steps: {shown}", flush=True)
        for variant, value in apart.items():
            limit = TOLERANCE[variant.precision]
            if variant.library == "alone":
                if value < 2 * limit:
                    raise SystemExit(f"the check fails to detect ranks that do not communicate ({value:.3f})")
            elif not value <= limit:
                raise SystemExit(
                    f"{variant.name} does not do the work of DDP: after {WARM_UP} steps its weights differ by "
                    f"{value:.3f} of the distance that DDP's weights moved, more than {limit}; nothing was timed. "
                    f"All: {shown}"
                )

    def _step_row(
        self,
        variant: Variant,
        times: dict[str, tuple[list[float], list[float]]],
        apart: float,
        alone: float | None,
    ) -> dict[str, Any]:
        wall, cpu = times[f"step {variant.name}"]
        base_wall, base_cpu = times[f"step {variant.baseline.name}"]
        return {
            **variant.columns,
            "step_s": min(wall),
            "step_s_median": median(wall),
            "cpu_s": min(cpu),
            "cpu_s_median": median(cpu),
            "baseline": variant.baseline.name,
            "ratio": min(wall) / min(base_wall),
            "ratio_median": median(a / b for a, b in zip(wall, base_wall)),
            "cpu_ratio": min(cpu) / min(base_cpu),
            "apart": apart,
            "apart_alone": alone,
            "tolerance": TOLERANCE[variant.precision],
            "mfu": self._mfu(variant, min(wall)),
        }

    def _mfu(self, variant: Variant, step_s: float) -> float | None:
        """Share of the device's peak that the backbone's work takes; None where the peak is not known."""
        dtype = torch.float32 if variant.precision == "fp32" else torch.bfloat16
        peak = peak_tflops(self.runtime.device, dtype)
        if peak is None:
            return None
        student = build_student(self.options, self.options["backbone"], torch.device("meta"))
        side = self.options["image_size"]
        flops = 2 * self.options["batch"] * encoder_train_macs(student, side, side)
        return flops / step_s / (peak * 1e12)

    def _teacher_row(
        self,
        variant: Variant,
        teacher: StoredTeacher,
        times: dict[str, tuple[list[float], list[float]]],
        images: Tensor,
    ) -> dict[str, Any]:
        """Time and bytes of an update; the bytes of a forward show that the counting works."""
        with CollectiveBytes() as update:
            teacher.update(DECAY)
        with CollectiveBytes() as forward:
            teacher(images)
        wall, cpu = times[f"ema {variant.name}"]
        step, _ = times[f"step {variant.name}"]
        return {
            **variant.columns,
            "teacher": type(teacher).__name__,
            "ema_s": min(wall),
            "ema_s_median": median(wall),
            "ema_cpu_s": min(cpu),
            "step_s": min(step),
            "ema_share": min(wall) / min(step),
            "ema_share_median": median(a / b for a, b in zip(wall, step)),
            "ema_bytes": update.bytes,
            "ema_collectives": update.calls,
            "forward_bytes": forward.bytes,
        }

    def memory(self, variant: Variant) -> list[dict[str, Any]]:
        """Bytes of the model states of one variant on this rank, and by the formulas; rows of rank 0."""
        options = self.options
        batch = build_batch(options, self.runtime, 1)
        before = storages()
        student = build_student(options, options["memory_backbone"], self.runtime.device)
        parameters = sum(parameter.numel() for parameter in student.parameters())
        buffers = sum(buffer.nbytes for buffer in student.buffers())
        buckets = {"reduce_bucket_size": parameters // BUCKETS} if variant.zero_stage else {}
        recipe = build_recipe(variant, options, self.folder, buckets)
        trainer = build_trainer(variant, student, recipe, self.runtime)
        deepspeed = trainer.deepspeed if isinstance(trainer, ZeroTrainer) else None
        measured: dict[str, tuple[int, int]] = {}

        def look(moment: str) -> None:
            buckets = {} if deepspeed is None else work_space(deepspeed)
            states = nbytes_beside(storages(), before | buckets) - buffers
            measured[moment] = (states, nbytes_beside(buckets, before))

        self._step(trainer, batch, 0)  # AdamW makes its moments at the first step
        if deepspeed is not None:
            _before_call(deepspeed, "allreduce_gradients", lambda: look(GRADIENTS))
        trainer.backward(*batch)
        if deepspeed is None:
            look(GRADIENTS)
        look(BEFORE_STEP)
        trainer.update(1)
        rows = []
        for moment, (size, apart) in measured.items():
            whole, divided = formula(variant)
            predicted = parameters * (sum(whole.values()) + sum(divided.values()) / self.runtime.world_size)
            rows.append(
                {
                    **variant.columns,
                    "part": "student",
                    "moment": moment,
                    **_against(parameters, size, predicted, formula_text(whole, divided)),
                    "buckets_mb": apart / 1e6,
                }
            )
        if isinstance(trainer, ZeroTrainer):
            rows.append(self._teacher_memory(variant, trainer, parameters, buffers, batch[0]))
        _release(trainer)
        return rows

    def _teacher_memory(
        self, variant: Variant, trainer: ZeroTrainer, parameters: int, buffers: int, images: Tensor
    ) -> dict[str, Any]:
        before = storages()
        average = build_student(self.options, self.options["memory_backbone"], self.runtime.device)
        teacher = build_teacher(average, trainer.engine)
        teacher.update(DECAY)
        teacher(images)
        alive = nbytes_beside(storages(), before) - buffers
        sharded = variant.zero_stage == 3
        predicted = 4 * parameters / (self.runtime.world_size if sharded else 1)
        return {
            **variant.columns,
            "part": "teacher",
            "moment": "between steps",
            **_against(parameters, alive, predicted, "4Ψ/N" if sharded else "4Ψ"),
            "buckets_mb": 0.0,
        }


def _against(parameters: int, size: int, predicted: float, text: str) -> dict[str, Any]:
    return {
        "parameters": parameters,
        "formula": text,
        "formula_mb": predicted / 1e6,
        "memory_mb": size / 1e6,
        "deviation": size / predicted - 1,
    }


def _before_call(thing: Any, method: str, look: Callable[[], None]) -> None:
    """Call ``look`` once, before the next call of a method of this one object."""
    plain = getattr(thing, method)

    def looked(*arguments: Any, **named: Any) -> Any:
        setattr(thing, method, plain)
        look()
        return plain(*arguments, **named)

    setattr(thing, method, looked)


def _flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def _release(trainer: Trainer) -> None:
    if isinstance(trainer, ZeroTrainer):
        trainer.deepspeed.destroy()
    gc.collect()


FAMILIES = (("fp32", FP32), ("bf16", BF16), ("bf16", AUTOCAST))


def chosen(family: Sequence[Variant], texts: Sequence[str] | None) -> list[Variant]:
    """The variants of our engine whose name contains one of the texts (None: all), and all of DDP."""
    return [v for v in family if texts is None or v.library == "ddp" or any(text in v.name for text in texts)]


def main(file: Path) -> None:
    """Measure as the file says; rank 0 writes the rows."""
    options = json.loads(file.read_text())
    place = Place.from_environment()
    folder = file.parent / f"rank-{place.rank}"
    folder.mkdir(exist_ok=True)
    first = build_recipe(Variant("deepspeed", "fp32", 1), options, folder)
    runtime = setup.start(place, first.engine)
    bench = Bench(options, runtime, folder)
    families = [chosen(family, options["variants"]) for name, family in FAMILIES if options[name]]
    families = [family for family in families if any(variant.library == "deepspeed" for variant in family)]
    result: dict[str, list[dict[str, Any]]] = {"rows": [], "teachers": [], "memory": []}
    gc.collect()
    gc.freeze()  # the many objects of the libraries need not be searched every time
    # Memory first, before the timed variants leave anything behind. Autocast sets a flag in the process, so it is last.
    for family in families:
        for variant in family:
            if variant.precision != "autocast-bf16" and not variant.fused:
                result["memory"] += bench.memory(variant)
    for family in families:
        steps, teachers = bench.family(family)
        result["rows"] += steps
        result["teachers"] += teachers
    if runtime.rank == 0:
        Path(options["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
