"""What the ranks send each other in a step, and how long that takes.

Bytes: of DeepSpeed 0.19.8 as this package sets it, and of the package's own collectives (docs/zero.md). Seconds: ring
algorithms, as NCCL and gloo use them for large messages: a ring goes through all ranks and crosses to the next host
once for each host, so each link of a host carries what one rank sends, over all adapters of the host together.
All-reduces of few bytes go along trees.

Not counted: the image of a neighbour that CutMix asks for where a rank has an odd number of unlabelled images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch.nn.modules.batchnorm import _BatchNorm

from maskmatch_scale.engine.sharded_teacher import product_weights
from maskmatch_scale.engine.zero import BUCKET_ELEMENTS, deepspeed_config
from maskmatch_scale.models import Segmenter
from maskmatch_scale.planning.setting import Cluster, Link
from maskmatch_scale.planning.subject import Subject
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.recipe.bases import has_unlabelled_loss
from maskmatch_scale.recipe.learning import uses_unlabelled

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


def step_traffic(subject: Subject, ranks: int, *, losses: Sequence[str] | None = None) -> list[Traffic]:
    """The collectives of one step; none on a single rank.

    Args:
        subject: what is trained.
        ranks: how many.
        losses: of the step, one forward and backward pass of the student in each micro-batch; None: those of a step
            after the burn-in.
    """
    if ranks == 1:
        return []
    recipe, student = subject.recipe, subject.student
    taken = losses_of(subject) if losses is None else tuple(losses)
    found = list(_of_engine(recipe, student, ranks, taken))
    if set(taken) - {"loss_x"}:
        found += _of_teacher(subject)
    norms = [module for module in student.modules() if isinstance(module, _BatchNorm)]
    if norms and recipe.model.batchnorm == "synchronised":
        passes = len(taken) * recipe.engine.accumulation
        channels = sum(norm.num_features for norm in norms)
        # Means with the count, squares, and two rows in the backward pass.
        found.append(Traffic("BatchNorm", "all_reduce", 4.0 * 4 * channels * passes, 3 * len(norms) * passes, None))
    found.append(Traffic("sums", "all_reduce", 100.0 * SUMS, SUMS, None))
    return [one for one in found if one.payload]


def losses_of(subject: Subject) -> tuple[str, ...]:
    """The losses of a step after the burn-in, by their names in `method.maskmatch.PARTS`."""
    method, views = subject.recipe.method, subject.unlabelled_images > 0
    there = {
        "loss_x": subject.labelled_images > 0,
        "loss_u": views and has_unlabelled_loss(method.base),
        "loss_m": views and method.mask.keep is not None,
    }
    return tuple(name for name, is_there in there.items() if is_there)


def _of_engine(recipe: Recipe, student: Segmenter, ranks: int, losses: Sequence[str]) -> Iterator[Traffic]:
    engine = recipe.engine
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    if engine.library == "accelerate":
        # DDP averages in the last backward pass of a step, while it goes on.
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
    else:
        # Averaged in each backward pass, whatever it reaches: the context decoder where features are guessed.
        context = sum(p.numel() for name, p in student.named_parameters() if name.startswith("context."))
        guessing = sum(loss in recipe.method.dropped for loss in losses) * engine.accumulation
        passes = len(losses) * engine.accumulation
        reached = passes * trained - (passes - guessing) * context
        overlaps = zero.get("overlap_comm", stage == 3)
        kind: Kind = (
            "all_reduce" if stage == 2 and zero.get("use_multi_rank_bucket_allreduce", True) else "reduce_scatter"
        )
        yield Traffic("gradients", kind, float(width * reached), calls * passes, "backward" if overlaps else None)
        if stage == 3:
            every = sum(p.numel() for p in student.parameters())
            read = {"forward": passes * every - (passes - guessing) * context, "backward": reached}
            at_once = zero.get("stage3_prefetch_bucket_size", PREFETCH_ELEMENTS)
            for during, elements in read.items():
                least = math.ceil(every / at_once) * passes
                yield Traffic(f"weights, {during}", "all_gather", float(weights * elements), least, cast(Any, during))
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
    if recipe.engine.zero_stage < 3 or subject.frozen_teacher is not None or not uses_unlabelled(recipe.method):
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
