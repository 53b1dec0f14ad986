"""What the ranks send each other in a step, and how long that takes.

Bytes: of DeepSpeed 0.19.8 as this package sets it, and of the package's own collectives (docs/zero.md). Seconds: ring
algorithms, as NCCL and gloo use them for large messages: a ring goes through all ranks and crosses to the next host
once for each host, so each link of a host carries what one rank sends, over all adapters of the host together.
All-reduces of few bytes go along trees.

Not counted: the image of a neighbour that CutMix asks for where a rank has an odd number of unlabelled images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch.nn.modules.batchnorm import _BatchNorm

from maskmatch_scale.engine.sharded_teacher import product_weights
from maskmatch_scale.engine.zero import BUCKET_ELEMENTS, deepspeed_config
from maskmatch_scale.models import Segmenter
from maskmatch_scale.planning.setting import Cluster, Link
from maskmatch_scale.planning.subject import Subject
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.recipe.bases import has_unlabelled_loss

Kind = Literal["all_reduce", "reduce_scatter", "all_gather"]

DDP_BUCKET_BYTES = 25 * 2**20
"""torch's DDP averages so much together."""
DEEPSPEED_BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's own at stage 0."""
PREFETCH_ELEMENTS = 50_000_000
"""DeepSpeed's `stage3_prefetch_bucket_size`."""
LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`."""
SUMS = 3
"""Sums of figures and of the gradient's norm in a step, a few numbers each."""


@dataclass(frozen=True)
class Traffic:
    """Collectives of one purpose in a step of the whole run."""

    what: str
    kind: Kind
    payload: float
    """Bytes that each rank has before a reduction, or after a gathering; of all calls together."""
    calls: float
    during: Literal["backward", "forward", "teacher"] | None
    """What goes on meanwhile; None: the device waits for it."""

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends."""
        return (2 if self.kind == "all_reduce" else 1) * (ranks - 1) / ranks * self.payload


def step_traffic(subject: Subject, ranks: int, *, views: int | None = None) -> list[Traffic]:
    """The collectives of one step after the burn-in; none on a single rank.

    Args:
        subject: what is trained.
        ranks: how many.
        views: forward passes of the student in a micro-batch; None: those of the recipe.
    """
    if ranks == 1:
        return []
    recipe, student = subject.recipe, subject.student
    found: list[Traffic] = []
    passes = (views or count_views(subject)) * recipe.engine.accumulation
    found += _of_engine(recipe, student, ranks, passes)
    found += _of_teacher(subject)
    norms = sum(isinstance(module, _BatchNorm) for module in student.modules())
    if norms and recipe.model.batchnorm == "synchronised":
        channels = sum(module.num_features for module in student.modules() if isinstance(module, _BatchNorm))
        # Means with the count, squares, and one sum in the backward pass.
        found.append(Traffic("BatchNorm", "all_reduce", 4.0 * 4 * channels * passes, 3 * norms * passes, None))
    found.append(Traffic("sums", "all_reduce", 100.0 * SUMS, SUMS, None))
    return [one for one in found if one.payload]


def count_views(subject: Subject) -> int:
    """Forward passes of the student in a micro-batch, each with a backward pass: one for each loss."""
    method = subject.recipe.method
    there = (
        subject.labelled_images > 0,
        subject.unlabelled_images > 0 and has_unlabelled_loss(method.base),
        subject.unlabelled_images > 0 and method.mask.keep is not None,
    )
    return sum(there)


def _of_engine(recipe: Recipe, student: Segmenter, ranks: int, passes: int) -> Iterator[Traffic]:
    engine = recipe.engine
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    every = sum(p.numel() for p in student.parameters())
    if engine.library == "accelerate":
        # DDP averages after the last backward pass of a step, while it goes on.
        yield Traffic("gradients", "all_reduce", 4.0 * trained, math.ceil(4 * trained / DDP_BUCKET_BYTES), "backward")
        return
    config = deepspeed_config(recipe, ranks)
    zero: dict[str, Any] = config["zero_optimization"]
    stage, width = engine.zero_stage, _bytes_of(config, recipe)
    weights = 2 if engine.precision in ("bf16", "fp16") else 4
    bucket = zero.get("reduce_bucket_size", BUCKET_ELEMENTS if stage else DEEPSPEED_BUCKET_ELEMENTS)
    calls = math.ceil(trained / bucket)
    if stage <= 1:
        yield Traffic("gradients", "all_reduce", float(width * trained), calls, None)
    elif stage == 2:
        kind: Kind = "all_reduce" if zero.get("use_multi_rank_bucket_allreduce", True) else "reduce_scatter"
        during: Literal["backward"] | None = "backward" if zero.get("overlap_comm") else None
        yield Traffic("gradients", kind, float(width * trained * passes), calls * passes, during)
    else:
        during = "backward" if zero.get("overlap_comm", True) else None
        yield Traffic("gradients", "reduce_scatter", float(width * trained * passes), calls * passes, during)
        gathers = math.ceil(every / zero.get("stage3_prefetch_bucket_size", PREFETCH_ELEMENTS))
        for half in ("forward", "backward"):
            what = f"weights, {half}"
            yield Traffic(what, "all_gather", float(weights * every * passes), gathers * passes, half)  # type: ignore[arg-type]
    if stage in (1, 2):
        yield Traffic("weights after the step", "all_gather", float(weights * trained), calls, None)
        if engine.precision in ("bf16", "fp16"):
            yield Traffic("masters for the average", "all_gather", 4.0 * trained, math.ceil(trained / 2**22), None)


def _bytes_of(config: dict[str, Any], recipe: Recipe) -> int:
    """Bytes of a gradient that is sent."""
    dtype = config.get("communication_data_type")
    if dtype is None or dtype == "auto":
        return 2 if recipe.engine.precision == "fp16" else 4
    return 4 if dtype == "fp32" else 2


def _of_teacher(subject: Subject) -> Iterator[Traffic]:
    """A sharded teacher gathers its weights: docs/zero.md has the formula."""
    recipe = subject.recipe
    if recipe.engine.zero_stage < 3 or subject.frozen_teacher is not None or not subject.unlabelled_images:
        return
    if recipe.method.views_of == "labelled":
        return
    zero = deepspeed_config(recipe, 2)["zero_optimization"] if recipe.engine.deepspeed_json else {}
    student = subject.student
    products = set(product_weights(student)) if recipe.engine.precision != "fp32" else set()
    read = {name: p.numel() for name, p in student.named_parameters() if not name.startswith("context.")}
    elements = sum(read.values())
    width = sum(count * (2 if name in products else 4) for name, count in read.items()) / elements
    bucket = zero.get("stage3_prefetch_bucket_size", PREFETCH_ELEMENTS)
    live = zero.get("stage3_max_live_parameters", LIVE_ELEMENTS)
    kept = elements if elements <= live else max(0, live - 3 * bucket)
    passes = len(recipe.method.scales) * recipe.engine.accumulation
    sent = kept + passes * (elements - kept)
    yield Traffic("teacher's weights", "all_gather", width * sent, math.ceil(sent / bucket), "teacher")


def seconds(traffic: Traffic, cluster: Cluster, network_share: float = 1.0) -> float:
    """How long its collectives take, with nothing else under way.

    Args:
        traffic: of a step.
        cluster: its ranks and links.
        network_share: share of the links' bandwidth that programs reach, 0–1.
    """
    ranks, a_host = cluster.ranks, cluster.ranks_per_host
    if ranks == 1:
        return 0.0
    hosts = ranks // a_host
    sent = traffic.sent(ranks)
    moving = 0.0
    if a_host > 1:
        moving = sent / (cluster.within.bandwidth * network_share)
    if hosts > 1:
        moving = max(moving, sent / (cluster.between.bandwidth * a_host * network_share))
    return moving + traffic.calls * _latency(traffic.kind, hosts, a_host, cluster.within, cluster.between)


def _latency(kind: Kind, hosts: int, a_host: int, within: Link, between: Link) -> float:
    """Of one collective: the messages that wait for each other."""
    ring = hosts * (a_host - 1) * within.latency_s + (hosts if hosts > 1 else 0) * between.latency_s
    if kind != "all_reduce":
        return ring
    tree = 2 * ((a_host - 1) * within.latency_s + math.ceil(math.log2(hosts)) * between.latency_s)
    return min(2 * ring, tree)


def scaled(traffic: Traffic, factor: float) -> Traffic:
    """So often as much."""
    return replace(traffic, payload=traffic.payload * factor, calls=traffic.calls * factor)
