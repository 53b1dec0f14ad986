"""The settings that a plan would choose, as overrides of the recipe.

The number of labelled images of a step stays as it is, and so does the precision. Of what fits, the least that is
sufficient is taken: no offloading before offloading, the largest micro-batch, the lowest ZeRO stage for it. Whether
activations are kept or computed again is decided by the predicted time.

Decision: docs/decisions/0075-what-a-plan-chooses.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from maskmatch_scale.errors import UserError
from maskmatch_scale.planning.build import Built, rebuilt
from maskmatch_scale.planning.memory import step_peak, usable_bytes
from maskmatch_scale.planning.setting import Cluster
from maskmatch_scale.planning.states import states
from maskmatch_scale.planning.step_time import StepTime, step_time
from maskmatch_scale.planning.subject import Subject

KEYS = (
    "library",
    "zero_stage",
    "micro_batch",
    "accumulation",
    "activation_checkpointing",
    "offload_optimizer",
    "offload_parameters",
    "precision",
)
"""Of the section `engine`, those that may be chosen."""


@dataclass(frozen=True)
class Setting:
    """One way to run a step."""

    library: str
    zero_stage: int
    micro_batch: int
    accumulation: int
    activation_checkpointing: bool
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass(frozen=True)
class Choice:
    """What was chosen."""

    subject: Subject
    overrides: tuple[str, ...]
    """To paste; empty: the recipe as it is."""
    reasons: tuple[str, ...]
    """One line for each."""
    time: StepTime
    fits_as_written: bool


def choose(built: Built, cluster: Cluster) -> Choice:
    """Choose settings.

    Raises:
        UserError: nothing fits: says what a rank would need, what it has, and what to do.
    """
    own = built.subject
    kept = _first(built, cluster, checkpointing=False)
    # If all images of a step fit at once, computing activations again can only take longer.
    best_already = kept is not None and kept.recipe.engine.accumulation == 1 and not _offloaded(kept)
    again = None if best_already else _first(built, cluster, checkpointing=True)
    found = [one for one in (kept, again) if one is not None]
    if not found:
        raise UserError(_nothing(built, cluster))
    least = min(map(_offloaded, found))
    found = [one for one in found if _offloaded(one) == least]
    timed = [(step_time(one, cluster), one) for one in found]
    time, best = min(timed, key=lambda pair: pair[0].seconds)
    fits = _fits(own, cluster)
    before, after = built.asked.engine, best.recipe.engine
    overrides = tuple(
        f"engine.{key}={_written(getattr(after, key))}"
        for key in KEYS
        if getattr(after, key) != getattr(before, key) and not (key == "precision" and before.precision == "auto")
    )
    return Choice(best, overrides, tuple(_reasons(own, best, overrides, cluster, fits, timed)), time, fits)


def _offloaded(subject: Subject) -> int:
    """How many kinds of state lie in host memory."""
    return subject.recipe.engine.offload_optimizer + subject.recipe.engine.offload_parameters


def _first(built: Built, cluster: Cluster, *, checkpointing: bool) -> Subject | None:
    """The first setting that fits, in the order of preference."""
    for setting in _settings(built.subject, cluster, checkpointing=checkpointing):
        subject = rebuilt(built, cluster.ranks, **vars(setting))
        if subject is not None and _fits(subject, cluster):
            return subject
    return None


def _fits(subject: Subject, cluster: Cluster) -> bool:
    is_on_device = step_peak(subject, cluster.ranks) <= usable_bytes(cluster.gpu.memory_bytes)
    return is_on_device and _offloaded_bytes(subject, cluster) <= cluster.host_memory_bytes // cluster.ranks_per_host


def _offloaded_bytes(subject: Subject, cluster: Cluster) -> int:
    """Of a rank, in its host's memory from step to step."""
    return states(subject, cluster.ranks)[1].offloaded


def _settings(subject: Subject, cluster: Cluster, *, checkpointing: bool) -> Iterator[Setting]:
    engine = subject.recipe.engine
    if checkpointing and (engine.compile or engine.cuda_graphs):
        return
    images = engine.micro_batch * engine.accumulation
    micro_batches = [size for size in range(images, 0, -1) if images % size == 0]
    first = engine.zero_stage if engine.zero_stage < 2 else 1
    for optimizer, parameters in ((False, False), (True, False), (True, True)):
        if (optimizer or parameters) and engine.library == "accelerate":
            continue
        stages = range(max(first, 3 if parameters else 1 if optimizer else 0), 4)
        for size in micro_batches:
            for stage in stages if cluster.ranks > 1 else stages[:1]:
                library = engine.library if stage == 0 else "deepspeed"
                yield Setting(library, stage, size, images // size, checkpointing, optimizer, parameters)


def _reasons(
    own: Subject,
    best: Subject,
    overrides: tuple[str, ...],
    cluster: Cluster,
    fits: bool,
    timed: list[tuple[StepTime, Subject]],
) -> Iterator[str]:
    if not fits:
        need, have = step_peak(own, cluster.ranks) / 1e9, usable_bytes(cluster.gpu.memory_bytes) / 1e9
        yield f"as written a rank needs {need:.3g} GB, and of a {cluster.gpu.name} tensors can take {have:.3g}"
    before, after = own.recipe.engine, best.recipe.engine
    if after.zero_stage != before.zero_stage:
        yield f"ZeRO-{after.zero_stage}: the lowest stage at which it fits; lower ones send less"
    if after.micro_batch != before.micro_batch:
        more = "the largest that fits" if after.accumulation > 1 else "all images of a step at once, which fits"
        images = after.micro_batch * after.accumulation
        yield f"micro_batch {after.micro_batch}: {more}; {images} labelled images a rank in a step, as before"
    if len(timed) > 1 and after.activation_checkpointing != before.activation_checkpointing:
        kept = next(time.seconds for time, one in timed if not one.recipe.engine.activation_checkpointing)
        again = next(time.seconds for time, one in timed if one.recipe.engine.activation_checkpointing)
        how = "computed again" if again < kept else "kept"
        yield f"activations {how}: {min(kept, again):.3g} s a step in place of {max(kept, again):.3g}"
    elif after.activation_checkpointing and not before.activation_checkpointing:
        yield "activation_checkpointing: without it nothing fits"
    if after.offload_optimizer:
        yield "offloading: without it nothing fits; a step waits for the host's memory"
    if not overrides:
        yield "it fits, and needs nothing that would slow it down"


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _nothing(built: Built, cluster: Cluster) -> str:
    """What is needed where nothing fits: of the setting that takes least."""
    engine, have = built.subject.recipe.engine, cluster.gpu.memory_bytes
    images = engine.micro_batch * engine.accumulation
    least = rebuilt(built, cluster.ranks, **vars(Setting("deepspeed", 3, 1, images, True, True, True)))
    if least is None:
        key = next((key for key in ("compile", "cuda_graphs", "deepspeed_json") if getattr(engine, key)), "precision")
        return (
            f"the recipe does not fit on {cluster.ranks} × {cluster.gpu.name} ({have / 1e9:.0f} GB), and engine.{key}="
            f"{_written(getattr(built.asked.engine, key))} rules out what saves memory; change it"
        )
    need, host = step_peak(least, cluster.ranks), _offloaded_bytes(least, cluster)
    share = cluster.host_memory_bytes // cluster.ranks_per_host
    too_much = f", and {host / 1e9:.3g} GB of the {share / 1e9:.3g} that are its share of the host's memory"
    more = next((ranks for ranks in _more(cluster) if _fits(least, replace(cluster, ranks=ranks))), None)
    remedy = "more GPUs do not help: lower data.crop_px or method.scales, or use GPUs with more memory"
    return (
        f"the recipe does not fit on {cluster.ranks} × {cluster.gpu.name} in any setting: with engine.zero_stage=3, "
        f"engine.activation_checkpointing=true, engine.micro_batch=1 and everything offloaded a rank needs "
        f"{need / 1e9:.3g} GB of the {usable_bytes(have) / 1e9:.3g} that tensors can take{too_much * (host > share)}; "
        + (remedy if more is None else f"use --gpus {more}")
    )


def _more(cluster: Cluster) -> Iterator[int]:
    """Larger numbers of ranks, such as equal hosts have. How many GPUs a single host could have is not known here."""
    for factor in (2, 4, 8, 16, 32, 64):
        ranks = cluster.ranks * factor
        is_usual = cluster.ranks > cluster.ranks_per_host or ranks & (ranks - 1) == 0
        yield ranks if is_usual else -(-ranks // 8) * 8
