"""Predictions beside what was measured, and the errors of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.harness import machine_line, markdown_table
from benchmarks.plan_vs_measured.cases import RANKS, Case, Subjects
from maskmatch_scale.planning.hardware import cluster_of
from maskmatch_scale.planning.memory import device_memory
from maskmatch_scale.planning.setting import Cluster, Gpu
from maskmatch_scale.planning.step_time import step_time

GOAL = 0.1
"""Largest error of the memory of a step that counts as met."""
STEP_GOAL = 0.2
"""The same of its seconds."""
COLUMNS = (
    *("family", "stage", "precision", "checkpointing", "crop_px", "keep"),
    *("held_mb", "planned_held_mb", "peak_mb", "planned_peak_mb", "error", "beside_error"),
    *("rss_mb", "cpu_s", "planned_s", "step_error", "wall_s"),
)


def with_plans(measured: Sequence[Mapping[str, Any]], cpu: Gpu) -> list[dict[str, Any]]:
    """Rows of what was measured, in 10⁶ bytes and seconds, with what is planned for the same case.

    Seconds are those that a rank computes: planned for ``cpu``, a measurement of one thread of this machine, and
    measured as its process time, in which it does not wait for the other rank. `step_error` is of these.

    `error`: of the most in a step. `beside_error`: of what a step adds to what is there before it, which a large model
    would otherwise hide.
    """
    subjects = Subjects()
    cluster = cluster_of(RANKS, cpu)
    return [_row(found, subjects, cluster) for found in measured]


def _row(found: Mapping[str, Any], subjects: Subjects, cluster: Cluster) -> dict[str, Any]:
    case = Case(**{name: found[name] for name in Case.__dataclass_fields__})
    subject = subjects.of(case)
    held, peaks = device_memory(subject, RANKS)
    peak = max(peaks.values())
    seconds = sum(part.seconds for part in step_time(subject, cluster).parts)
    columns = {name: found[name] for name in Case.__dataclass_fields__}
    return columns | {
        "held_mb": found["held_bytes"] / 1e6,
        "planned_held_mb": held / 1e6,
        "peak_mb": found["peak_bytes"] / 1e6,
        "planned_peak_mb": peak / 1e6,
        "planned_at": max(peaks, key=lambda moment: peaks[moment]),
        "error": peak / found["peak_bytes"] - 1,
        "beside_error": (peak - held) / (found["peak_bytes"] - found["held_bytes"]) - 1,
        "building_mb": found["building_bytes"] / 1e6,
        "rss_mb": found["rss_bytes"] / 1e6,
        "cpu_s": found["cpu_s"],
        "planned_s": seconds,
        "step_error": seconds / found["cpu_s"] - 1,
        "wall_s": found["wall_s"],
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Errors of each stage: how many cases, the median and the largest, and whether the goal is met."""
    found = []
    for stage in sorted({row["stage"] for row in rows}):
        errors = [abs(row["error"]) for row in rows if row["stage"] == stage]
        beside = [abs(row["beside_error"]) for row in rows if row["stage"] == stage]
        steps = [abs(row["step_error"]) for row in rows if row["stage"] == stage]
        found.append(
            {
                "stage": stage,
                "cases": len(errors),
                "median_error": median(errors),
                "largest_error": max(errors),
                "median_beside_error": median(beside),
                "largest_beside_error": max(beside),
                "memory_met": "yes" if max(errors) <= GOAL else "no",
                "median_step_error": median(steps),
                "largest_step_error": max(steps),
                "step_met": "yes" if max(steps) <= STEP_GOAL else "no",
            }
        )
    return found


def page(machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The page in Markdown."""
    errors = summary(rows)
    return "\n".join(
        [
            "# plan_vs_measured: what `maskmatch plan` predicts, against real steps",
            "",
            machine_line(machine),
            "",
            f"Memory of tensors of a rank of {RANKS} in a real step of `training.step.take_step`, in 10⁶ bytes: by "
            "torch's own allocations and frees, at stage 3 by the storages that operations make (see `measure.py`). "
            "held: before the step. peak: the most in it. error: of the predicted peak. beside_error: of what the step "
            "adds to what is held. rss: growth of the process's resident memory. cpu_s (process time) and wall_s: the "
            "fastest step of the slower rank. planned_s: what it computes, by a measurement of one thread of this "
            "machine; step_error: against cpu_s.",
            "",
            markdown_table(errors, tuple(errors[0])),
            markdown_table(rows, COLUMNS),
        ]
    )
