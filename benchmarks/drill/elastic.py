"""Another number of ranks, another ZeRO stage, another engine: the same losses, and every sample once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.drill.evidence import compare_samples, steps_again
from benchmarks.drill.report import Row
from benchmarks.drill.setting import Sections, Setting, outlived
from benchmarks.harness import say
from benchmarks.small_runs import compare_losses, compare_states
from maskmatch_scale.errors import RESUMABLE

STEPS, STOP_AFTER = 24, 5
TOLERANCE = 1e-6
"""Of fp32 losses, relative."""

SAME = {"data": {"lanes": 2}, "method": {"threshold": 0.0}, "engine": {"micro_batch": 2}}
"""The order of samples is cut for two ranks, whatever their number. Every pixel counts: at a threshold, a confidence
that differs in its last bit would change the loss by a whole pixel."""
OVER_MICRO_BATCHES = {
    **SAME,
    "model": {"batchnorm": "frozen"},
    "method": {"threshold": 0.0, "strong_view": {"cutmix_probability": 0.0}},
}
"""BatchNorm's statistics and CutMix's pairs are those of a micro-batch, which is what changes."""
BY_RANKS = {**SAME, "data": {}}
"""The order is cut for as many ranks as there are."""


@dataclass(frozen=True)
class _Case:
    name: str
    middle: tuple[str, ...] = ()
    """Keys of the middle third."""
    ranks: int = 2
    """Of the middle third."""
    launcher: str | None = None
    """Of the middle third; None: one that does not matter."""
    sections: Sections = field(default_factory=lambda: SAME)
    note: str = ""


CASES = (
    _Case("2 → 1 → 2 ranks, larger micro-batches", ("engine.micro_batch=4",), ranks=1),
    _Case(
        "2 → 1 → 2 ranks, more micro-batches",
        ("engine.accumulation=2",),
        ranks=1,
        sections=OVER_MICRO_BATCHES,
        note="no CutMix, BatchNorm frozen",
    ),
    _Case("ZeRO 1 → 3 → 1", ("engine.zero_stage=3",)),
    _Case("ZeRO 1 → 2 → 1", ("engine.zero_stage=2",)),
    _Case(
        "deepspeed → accelerate → deepspeed",
        ("engine.library=accelerate", "engine.zero_stage=0"),
        launcher="accelerate",
    ),
    _Case("2 → 1 → 2 ranks, ZeRO 1 → 3 → 1", ("engine.micro_batch=4", "engine.zero_stage=3"), ranks=1),
    _Case(
        "2 → 1 → 2 ranks, another order",
        ("engine.micro_batch=4",),
        ranks=1,
        sections=BY_RANKS,
        note="losses are not compared",
    ),
)


def run(setting: Setting) -> Iterator[Row]:
    """Every case is a job of three sessions; the first two are stopped by SIGTERM."""
    for number, case in enumerate(CASES[:1] if setting.short else CASES):
        setting.now = f"elastic: case {number + 1} of {len(CASES)}"
        same_order = case.sections is not BY_RANKS
        other = setting.reference(STEPS, case.sections if same_order else SAME)
        job = setting.job(f"elastic-{number}", STEPS, case.sections)
        moved = 0
        for part in range(3):
            if part == 1:
                session = job.start(case.launcher or setting.plain, *case.middle, ranks=case.ranks)
            else:
                session = job.start(setting.plain)
            if part < 2:
                session.wait_for(lambda session=session: session.steps() >= STOP_AFTER)  # type: ignore[misc]
                session.signal(signal.SIGTERM, session.ranks().values())
            session.end()
            went_on = bool(session.steps()) and set(session.codes) == {RESUMABLE if part < 2 else 0}
            moved += went_on and part > 0
            if not went_on:
                say(f"elastic: {case.name}, part {part + 1}:\n{session.printed[-3000:]}")
        samples = compare_samples(job, other, STEPS, setting.sizes)
        figures: dict[str, Any] = {"lost": samples.lost, "repeated": samples.repeated, "outlived": outlived(job)}
        if same_order:
            weights = float("inf")
            if job.checkpoint(STEPS).is_dir():
                weights = compare_states(job.checkpoint(STEPS), other.checkpoint(STEPS), ("student", "ema"))
            figures |= {"losses": compare_losses(job.run, other.run, STEPS), "weights": weights}
            figures["moved_steps"] = samples.moved_steps
        yield Row(
            "elastic", case.name, 2, moved, STEPS, steps_again(job), tolerance=TOLERANCE,
            note=case.note, **figures,
        )  # fmt: skip
