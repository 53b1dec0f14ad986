"""The tables of docs/scaling.md, from the results: between `<!-- scaling_model: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.harness import markdown_table
from benchmarks.scaling_model.cases import CASES, STAGES

Rows = Sequence[Mapping[str, Any]]

_SHOWN = (8, 64, 256, 1024, 4096)
_FAILING = (64, 256, 1024, 4096)


def with_tables(text: str, found: Mapping[str, Rows]) -> str:
    """The page with its tables made again.

    Raises:
        KeyError: the page has a table that is not made here.
    """
    made = dict(_tables(found))

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{made[match[2]]}{match[3]}"

    return re.sub(r"(<!-- scaling_model: (\w+) -->\n).*?(<!-- end -->)", table, text, flags=re.S)


def _tables(found: Mapping[str, Rows]) -> Iterator[tuple[str, str]]:
    weak = {(row["model"], row["zero_stage"], row["gpus"]): row for row in found["rows"]}
    strong = {(row["model"], row["zero_stage"], row["batch"], row["gpus"]): row for row in found["strong"]}
    failures = {(row["model"], row["gpus"]): row for row in found["failures"]}
    demand = {(row["model"], row["gpus"]): row for row in found["demand"]}
    names = [case.name for case in CASES]
    yield "check", _check(found["check"])
    yield (
        "weak",
        _table(
            {"model": name, "ZeRO": stage}
            | {f"{gpus:,}": f"{weak[name, stage, gpus]['efficiency']:.2f}" for gpus in _SHOWN}
            | {
                "step on one GPU": f"{weak[name, stage, 1]['step_s']:.2f} s",
                "limit at 64, 1,024": ", ".join(weak[name, stage, gpus]["limit"] for gpus in (64, 1024)),
                "slowest of the network at 1,024": weak[name, stage, 1024]["slowest_collective"],
            }
            for name in names
            for stage in STAGES
        ),
    )
    places = ((1024, 256), (16384, 1024), (16384, 4096))
    yield (
        "strong",
        _table(
            {"model": name, "ZeRO": stage}
            | {
                f"{batch:,} + {batch:,} on {gpus:,}": f"{strong[name, stage, batch, gpus]['speedup']:,.0f} ×"
                for batch, gpus in places
            }
            for name in names
            for stage in (1, 3)
        ),
    )
    yield (
        "states",
        _table(
            {"model": name} | {f"ZeRO-{stage}": f"{weak[name, stage, 64]['states_gb']:.1f} GB" for stage in STAGES}
            for name in names
        ),
    )
    yield (
        "failures",
        _table(
            {
                "GPUs": f"{gpus:,}",
                "one failure in": f"{failures[names[0], gpus]['hours_between_failures']:.0f} h",
                "best interval": f"{failures[names[0], gpus]['interval_s'] / 60:.0f} min",
                **{f"steps, {name}": f"{failures[name, gpus]['interval_steps']:,}" for name in names},
                "lost at it": f"{failures[names[0], gpus]['lost']:.1%}",
                "lost every 1,000 steps": ", ".join(
                    f"{failures[name, gpus]['lost_at_1000_steps']:.1%}" for name in names
                ),
            }
            for gpus in _FAILING
        ),
    )
    yield (
        "shards",
        _table(
            {
                "samples a shard": f"{row['samples_a_shard']:,}",
                "shards": f"{row['shards']:,}",
                "a shard": f"{row['shard_mb']:,.0f} MB",
                "table": f"{row['table_mb']:,.0f} MB",
                "opened in": f"{row['open_first_s']:.2g} s",
                "memory of a node": f"{row['node_memory_mb']:,.0f} MB",
            }
            for row in found["shards"]
        ),
    )
    yield (
        "demand",
        _table(
            {
                "model": name,
                "GPUs": f"{gpus:,}",
                "from the store": f"{demand[name, gpus]['store_gb_s']:.2g} GB/s",
                "shards of 1,000 a second": f"{demand[name, gpus]['requests_per_s_1000']:.2g}",
                "cores a GPU for decoding": f"{demand[name, gpus]['decode_cores_a_gpu']:.2g}",
                "days for one pass": _two_digits(demand[name, gpus]["days_for_all"]),
            }
            for name in names
            for gpus in (64, 1024)
        ),
    )


def _two_digits(number: float) -> str:
    """Of numbers below a million, without an exponent."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _check(rows: Rows) -> str:
    slow = [row for row in rows if row["step_error"] is not None]
    if not slow:
        return "Not measured in the last run.\n"
    return _table(
        {
            "ZeRO": row["zero_stage"],
            "ranks": row["ranks"],
            "MB a step": f"{row['sent_mb']:.1f}",
            "predicted": f"{row['predicted_sent_mb']:.1f} ({row['bytes_error']:+.1%})",
            "a step at 200 Mbit/s": f"{row['step_s']:.2f} s",
            "predicted from 1,000 Mbit/s": f"{row['predicted_step_s']:.2f} s ({row['step_error']:+.0%})",
        }
        for row in slow
    )


def _table(rows: Iterator[dict[str, Any]]) -> str:
    listed = list(rows)
    return markdown_table(listed, tuple(listed[0]))
