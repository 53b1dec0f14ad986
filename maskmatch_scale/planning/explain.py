"""A plan as a table that people read, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from maskmatch_scale.planning.plan import Plan
from maskmatch_scale.planning.step_time import TITLES, StepTime

Rows = list[tuple[str, str]]

REMEDIES = {
    "compute": "a lower method.mask.keep or strong_view.keep, fewer method.scales, or more GPUs",
    "memory bandwidth": "engine.compile, which joins operations; bf16 in place of fp32",
    "launches": "more images in a micro-batch, which take hardly longer; engine.compile; on one GPU engine.cuda_graphs",
    "network": "a lower ZeRO stage, a larger micro-batch with less accumulation, or a faster link",
    "loader": "more data.workers, or hosts with more cores",
}
"""By what a step waits for."""


def explain(plan: Plan) -> dict[str, Rows]:
    """Rows of a table, in sections by their titles."""
    return {
        "the run": list(_run(plan)),
        "memory of a rank": list(_memory(plan)),
        "a step": list(_step(plan)),
        "network, a step": list(_network(plan)),
        "data": list(_data(plan)),
        "length": list(_length(plan)),
        "settings": list(_settings(plan)),
    }


def _run(plan: Plan) -> Iterator[tuple[str, str]]:
    recipe, cluster, gpu = plan.subject.recipe, plan.cluster, plan.cluster.gpu
    engine = recipe.engine
    hosts = cluster.ranks // cluster.ranks_per_host
    yield "model", f"{recipe.model.backbone}, {_count(_parameters(plan))} parameters"
    if plan.subject.frozen_teacher is not None:
        other = sum(p.numel() for p in plan.subject.frozen_teacher.parameters())
        yield "frozen teacher", f"{_count(other)} parameters, whole on every rank"
    yield (
        "ranks",
        f"{cluster.ranks} × {gpu.name} on {hosts} host{'s' if hosts > 1 else ''}, {_gb(gpu.memory_bytes)} each",
    )
    yield (
        "images of a step",
        f"{plan.images_a_step:,} distinct: a rank takes {plan.subject.labelled_images} labelled and "
        f"{plan.subject.unlabelled_images} unlabelled × {engine.accumulation}, {recipe.data.crop_px[0]}×"
        f"{recipe.data.crop_px[1]} px",
    )
    yield "engine", f"{engine.library}, ZeRO-{engine.zero_stage}, {engine.precision}"
    for note in plan.notes:
        yield "note", note


def _memory(plan: Plan) -> Iterator[tuple[str, str]]:
    memory = plan.memory
    found = "fits" if memory.fits else "does not fit"
    yield "peak", f"{_gb(memory.peak)} of {_gb(memory.usable)} that tensors can take: {found}"
    for name, size in memory.states.by_name.items():
        if size:
            yield name.replace("_", " "), _gb(size)
    for name, size in memory.peaks.items():
        trace = memory.traces.get(name)  # type: ignore[call-overload]
        beside = "" if trace is None else f", of it {_gb(trace.peak_bytes)} in the pass"
        if trace is not None and trace.saved_bytes:
            beside += f", {_gb(trace.saved_bytes)} kept for its backward"
        yield f"most: {TITLES.get(name, name)}", _gb(size) + beside
    yield "all views in one pass", f"would need {_gb(memory.together)}"
    yield (
        "largest micro_batch",
        f"{memory.largest_micro_batch} labelled images" if memory.largest_micro_batch else "none fits",
    )
    share = plan.cluster.host_memory_bytes / plan.cluster.ranks_per_host
    yield (
        "host memory",
        f"{_gb(memory.host.peak)} a rank, while it is built or a checkpoint is written; its share is {_gb(share)}",
    )
    for row in plan.stages:
        where = "" if not row.offloaded else ", all offloaded" if len(row.offloaded) > 1 else ", optimizer off"
        name = f"ZeRO-{row.zero_stage}{where}"
        again = "" if row.again_bytes is None else f", {_gb(row.again_bytes)} with checkpointing"
        host = f"; {_gb(row.host_bytes)} in host memory" if row.host_bytes else ""
        yield name, f"states {_gb(row.states_bytes)}; most {_gb(row.kept_bytes)}{again}{host}"


def _step(plan: Plan) -> Iterator[tuple[str, str]]:
    time = plan.time
    yield "seconds", f"{_seconds(plan.step_s)}; in the burn-in {_seconds(time.burn_in_s)}"
    for part in time.parts:
        work = (part.forward, part.backward)
        device = sum(one.products_s + one.moving_s for one in work)
        launches = sum(one.launches for one in work)
        told = [f"{part.flops / 1e12:.3g} TFLOP"] if part.flops > 1e9 else []
        if launches:
            told.append(f"device {_seconds(device)}, {launches:,} launches {_seconds(sum(w.launches_s for w in work))}")
        yield part.name, ", ".join([_seconds(part.seconds), *told])
    exposed = sum(one.exposed_s for one in time.network)
    if time.network:
        yield "network, not hidden", _seconds(exposed)
    yield "limit", f"{plan.bottleneck} ({_shares(time)})"
    yield "what would help", REMEDIES[plan.bottleneck]
    gpu, precision = plan.cluster.gpu, plan.subject.recipe.engine.precision
    peak = gpu.fp32_flops if precision == "fp32" else gpu.half_flops
    yield "share of the peak", f"{time.flops / plan.step_s / peak:.1%} of {peak / 1e12:.4g} TFLOP/s"


def _shares(time: StepTime) -> str:
    shares = time.share_of()
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)


def _network(plan: Plan) -> Iterator[tuple[str, str]]:
    cluster = plan.cluster
    if cluster.ranks == 1:
        yield "nothing", "there is one rank"
        return
    if cluster.ranks_per_host > 1:
        yield "within a host", f"{cluster.within.name}, {cluster.within.bandwidth / 1e9:.4g} GB/s a rank"
    if cluster.ranks > cluster.ranks_per_host:
        yield "between hosts", f"{cluster.between.name}, {cluster.between.bandwidth / 1e9:.4g} GB/s a rank"
    for one in plan.time.network:
        during = f", {_seconds(one.exposed_s)} of it not hidden by the {one.during}" if one.during else ""
        yield one.what, f"{_bytes(one.sent_bytes)} sent by a rank, {_seconds(one.seconds)}{during}"


def _data(plan: Plan) -> Iterator[tuple[str, str]]:
    counts, read, cluster = plan.counts, plan.loading, plan.cluster
    known = [
        f"{number:,} {name}"
        for name, number in (("labelled", counts.labelled), ("unlabelled", counts.unlabelled))
        if number is not None
    ]
    yield "samples", ", ".join(known) or "unknown"
    size = f"{read.bytes_a_sample / 1e3:.0f} kB an image" + ("" if read.bytes_known else " assumed")
    yield "a host reads", f"{read.images_per_s:,.0f} images/s, {_bytes(read.bytes_per_s)}/s of shards ({size})"
    workers = plan.subject.recipe.data.workers * cluster.ranks_per_host
    yield (
        "cores that decode",
        f"{read.cores:.1f} of {cluster.cores_per_host} on each host; data.workers={plan.subject.recipe.data.workers} "
        f"gives {workers or 'none beside the ranks themselves'}",
    )
    if plan.bottleneck == "loader":
        needed = -(-read.cores * plan.slowest_loader_s / plan.time.seconds // cluster.ranks_per_host)
        yield "too slow", f"the loader is the limit: data.workers={needed:.0f}, if the hosts have the cores"


def _length(plan: Plan) -> Iterator[tuple[str, str]]:
    length = plan.length
    if length.steps is None or length.gpu_hours is None or length.hours is None:
        yield "unknown", "say --images N, or run.steps"
        return
    yield "steps", f"{length.steps:,}, which read {length.images:,} images"
    yield "time", f"{_hours(length.hours)}, {length.gpu_hours:,.3g} GPU-hours; evaluations and checkpoints not counted"
    if length.price is not None:
        yield "price", f"{length.price:,.2f}"


def _settings(plan: Plan) -> Iterator[tuple[str, str]]:
    choice = plan.choice
    if choice is None:
        return
    yield "chosen", " ".join(choice.overrides) or "the recipe as it is"
    for reason in choice.reasons:
        yield "because", reason
    if choice.overrides:
        yield "then a step takes", f"{_seconds(choice.time.seconds)}, limit {_shares(choice.time)}"


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything as plain values: bytes, seconds, FLOPs."""
    choice, time = plan.choice, plan.time
    return {
        "parameters": _parameters(plan),
        "cluster": asdict(plan.cluster),
        "precision": plan.subject.recipe.engine.precision,
        "images_a_step": plan.images_a_step,
        "notes": list(plan.notes),
        "memory": {
            "states": plan.memory.states.by_name,
            "host": asdict(plan.memory.host),
            "peaks": dict(plan.memory.peaks),
            "peak": plan.memory.peak,
            "together": plan.memory.together,
            "usable": plan.memory.usable,
            "fits": plan.memory.fits,
            "largest_micro_batch": plan.memory.largest_micro_batch,
            "stages": [asdict(row) for row in plan.stages],
        },
        "step": {
            "seconds": plan.step_s,
            "burn_in_seconds": time.burn_in_s,
            "flops": time.flops,
            "parts": [
                {"name": part.name, "seconds": part.seconds, "flops": part.flops}
                | {f"{way}": asdict(work) for way, work in (("forward", part.forward), ("backward", part.backward))}
                for part in time.parts
            ],
            "shares": time.share_of(),
            "bottleneck": plan.bottleneck,
        },
        "network": [asdict(one) for one in time.network],
        "samples": {"labelled": plan.counts.labelled, "unlabelled": plan.counts.unlabelled},
        "loading": asdict(plan.loading) | {"step_seconds": plan.slowest_loader_s},
        "length": asdict(plan.length),
        "chosen": None
        if choice is None
        else {
            "overrides": list(choice.overrides),
            "reasons": list(choice.reasons),
            "fits_as_written": choice.fits_as_written,
            "step_seconds": choice.time.seconds,
        },
    }


def _parameters(plan: Plan) -> int:
    return sum(p.numel() for p in plan.subject.student.parameters())


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def _bytes(size: float) -> str:
    return _gb(size) if size >= 1e6 else f"{size / 1e3:.3g} kB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


def _hours(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours >= 1 / 60 else f"{hours * 3600:.0f} s"
