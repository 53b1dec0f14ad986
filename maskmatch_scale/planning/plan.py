"""A plan: what a run of a recipe needs on a cluster, how long it takes, and settings that fit.

plan(recipe, cluster_of(64, gpu_named("h100")))
"""

from __future__ import annotations

from dataclasses import dataclass

from maskmatch_scale.planning.build import Built, build
from maskmatch_scale.planning.choose import Choice, choose
from maskmatch_scale.planning.loading import Counts, Loading, count, loading
from maskmatch_scale.planning.memory import MemoryPlan, plan_memory
from maskmatch_scale.planning.setting import Cluster
from maskmatch_scale.planning.stages import Stage, at_every_stage
from maskmatch_scale.planning.step_time import StepTime, step_time
from maskmatch_scale.planning.subject import Subject
from maskmatch_scale.recipe import Recipe


@dataclass(frozen=True)
class Length:
    """How long a run is, evaluations and checkpoints aside."""

    steps: int | None
    """None: nobody knows, because the data cannot be read and the recipe counts in epochs."""
    images: int | None
    """Distinct images that it sees, each as often as it is read."""
    hours: float | None
    gpu_hours: float | None
    price: float | None
    """In the currency of the price that was given."""


@dataclass(frozen=True)
class Plan:
    """What a run needs, as its recipe says it; and what would be chosen."""

    subject: Subject
    cluster: Cluster
    notes: tuple[str, ...]
    """What was assumed, what could not be read."""
    memory: MemoryPlan
    stages: tuple[Stage, ...]
    """The same at every ZeRO stage and offload choice; empty if no settings were asked for."""
    time: StepTime
    counts: Counts
    loading: Loading
    slowest_loader_s: float
    """Seconds that the loader of a host needs for a step, if it were alone."""
    length: Length
    choice: Choice | None
    """None: it was not asked for."""

    @property
    def step_s(self) -> float:
        """Seconds of a step: the slower of the device and the loader."""
        return max(self.time.seconds, self.slowest_loader_s)

    @property
    def images_a_step(self) -> int:
        """Distinct images of a step, over all ranks."""
        return images_a_rank(self.subject) * self.cluster.ranks

    @property
    def bottleneck(self) -> str:
        """What a step waits for longest: compute, memory bandwidth, launches, network or loader."""
        if self.slowest_loader_s > self.time.seconds:
            return "loader"
        shares = self.time.share_of()
        return max(shares, key=lambda name: shares[name])


def images_a_rank(subject: Subject) -> int:
    """Distinct images of a rank in a step after the burn-in."""
    recipe = subject.recipe
    unlabelled = subject.unlabelled_images if recipe.method.views_of == "unlabelled" else 0
    return (subject.labelled_images + unlabelled) * recipe.engine.accumulation


def plan(
    what: Recipe | Built,
    cluster: Cluster,
    *,
    classes: int | None = None,
    images: int | None = None,
    price: float | None = None,
    chosen: bool = True,
) -> Plan:
    """Plan a run.

    Args:
        what: a recipe as it was loaded, or what was built of it.
        cluster: where it would run.
        classes: of data that cannot be read.
        images: length of the run in distinct images, in place of the recipe's steps.
        price: of a GPU for an hour.
        chosen: whether to look for settings too.

    Raises:
        UserError: the recipe cannot be run, or fits in no setting on these GPUs: one line that says what would.
    """
    built = build(what, cluster.gpu, classes) if isinstance(what, Recipe) else what
    subject = built.subject
    counts = count(subject, built.index, cluster)
    time = step_time(subject, cluster)
    a_host = images_a_rank(subject) * cluster.ranks_per_host
    read = loading(a_host, time.seconds, counts)
    workers = subject.recipe.data.workers
    loader_s = read.fastest_step_s(a_host, cluster.cores_per_host, workers, cluster.ranks_per_host)
    choice = choose(built, cluster) if chosen else None
    seconds = max(time.seconds, loader_s)
    length = _length(subject, cluster, counts, seconds, time.burn_in_s, images, price)
    return Plan(
        subject,
        cluster,
        (*built.notes, *counts.notes),
        plan_memory(subject, cluster),
        tuple(at_every_stage(built, cluster)) if chosen else (),
        time,
        counts,
        loading(a_host, seconds, counts),
        loader_s,
        length,
        choice,
    )


def _length(
    subject: Subject,
    cluster: Cluster,
    counts: Counts,
    step_s: float,
    burn_in_s: float,
    images: int | None,
    price: float | None,
) -> Length:
    recipe, ranks = _with_steps(subject.recipe, counts, cluster.ranks), cluster.ranks
    a_step = images_a_rank(subject) * ranks
    if images is not None:
        steps, seen = -(-images // a_step), images
        seconds = steps * step_s
    elif recipe.run.steps:
        steps, burn_in = recipe.run.steps, recipe.burn_in_steps
        labelled = subject.labelled_images * recipe.engine.accumulation * ranks
        seen = (steps - burn_in) * a_step + burn_in * labelled
        seconds = (steps - burn_in) * step_s + burn_in * burn_in_s
    else:
        return Length(None, None, None, None, None)
    gpu_hours = seconds * ranks / 3600
    return Length(steps, seen, seconds / 3600, gpu_hours, None if price is None else gpu_hours * price)


def _with_steps(recipe: Recipe, counts: Counts, ranks: int) -> Recipe:
    labelled = counts.unlabelled == 0
    samples = counts.labelled if labelled else counts.unlabelled
    if recipe.run.epochs is None or not samples:
        return recipe
    images = recipe.engine.micro_batch * recipe.engine.accumulation * ranks
    images *= 1 if labelled else recipe.data.unlabelled_per_labelled
    return recipe.with_steps(samples, images, labelled=labelled)
