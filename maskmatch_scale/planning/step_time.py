"""How long a step takes, and why: the device's work, its launches, and what of the network is not hidden.

The parts of a step run one after the other. Within a part the host launches operations while the device works, so a
part takes the longer of the two. Collectives that go on beside a part cost what the part leaves of them, and at least
their last one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from maskmatch_scale.planning import efficiency
from maskmatch_scale.planning.communication import Traffic, scaled, seconds, step_traffic
from maskmatch_scale.planning.measured import rates_of
from maskmatch_scale.planning.rates import Rates
from maskmatch_scale.planning.recorder import Operation
from maskmatch_scale.planning.setting import Cluster
from maskmatch_scale.planning.subject import Subject
from maskmatch_scale.planning.trace import Pass, images_of, passes_of, trace

TITLES: dict[str, str] = {
    "views": "views drawn",
    "teacher": "teacher",
    "loss_x": "labelled view",
    "loss_u": "strong views",
    "loss_m": "masked view",
}


@dataclass(frozen=True)
class Work:
    """Operations of one direction of a part."""

    flops: float = 0.0
    products_s: float = 0.0
    """Of the device, in operations that their products bound."""
    moving_s: float = 0.0
    """Of the device, in operations that their bytes bound."""
    launches_s: float = 0.0
    """Of the host."""
    launches: int = 0

    @property
    def seconds(self) -> float:
        """The longer of device and host."""
        return max(self.products_s + self.moving_s, self.launches_s)


@dataclass(frozen=True)
class Part:
    """One part of a step, over all micro-batches of a rank."""

    name: str
    forward: Work
    backward: Work

    @property
    def seconds(self) -> float:
        """Of both directions."""
        return self.forward.seconds + self.backward.seconds

    @property
    def flops(self) -> float:
        """Of both directions, on a rank."""
        return self.forward.flops + self.backward.flops


@dataclass(frozen=True)
class Sending:
    """Collectives of one purpose."""

    what: str
    sent_bytes: float
    """By each rank, in a step."""
    seconds: float
    """With nothing else under way."""
    exposed_s: float
    """What the step is longer for them."""
    during: str | None


@dataclass(frozen=True)
class StepTime:
    """One step after the burn-in."""

    parts: tuple[Part, ...]
    network: tuple[Sending, ...]
    burn_in_s: float
    """Of a step of the burn-in, which has the labelled view alone."""

    @property
    def seconds(self) -> float:
        """Of the step, data and evaluations aside."""
        return sum(part.seconds for part in self.parts) + sum(one.exposed_s for one in self.network)

    @property
    def flops(self) -> float:
        """Of a rank."""
        return sum(part.flops for part in self.parts)

    def share_of(self) -> dict[str, float]:
        """Share of the step that each limit takes, 0–1: compute, memory bandwidth, launches, network."""
        found = {"compute": 0.0, "memory bandwidth": 0.0, "launches": 0.0, "network": 0.0}
        for work in (work for part in self.parts for work in (part.forward, part.backward)):
            if work.launches_s > work.products_s + work.moving_s:
                found["launches"] += work.seconds
            else:
                found["compute"] += work.products_s
                found["memory bandwidth"] += work.moving_s
        found["network"] = sum(one.exposed_s for one in self.network)
        total = self.seconds or 1.0
        return {name: value / total for name, value in found.items()}


def step_time(subject: Subject, cluster: Cluster) -> StepTime:
    """Predict one step of a rank.

    Args:
        subject: recipe and models; its micro-batch is traced (`planning/trace.py`).
        cluster: GPUs and links.
    """
    return with_network(subject, cluster, computed(subject, cluster))


def computed(subject: Subject, cluster: Cluster) -> dict[Pass, Part]:
    """The passes of all micro-batches of a rank; they do not depend on the number of ranks, nor on the links."""
    rates = rates_of(cluster.gpu)
    return {name: _part(subject, name, rates) for name in passes_of(subject)}


def with_network(subject: Subject, cluster: Cluster, passes: Mapping[Pass, Part]) -> StepTime:
    """A whole step of a rank, from :func:`computed`."""
    rates = rates_of(cluster.gpu)
    update = (_optimizer(subject, cluster, rates), _average(subject, cluster, rates))
    network = _network(step_traffic(subject, cluster.ranks), cluster, rates, passes)
    burn_in_s = 0.0
    if "loss_x" in passes:
        alone: dict[Pass, Part] = {"loss_x": passes["loss_x"]}
        sending = _network(step_traffic(subject, cluster.ranks, losses=["loss_x"]), cluster, rates, alone)
        burn_in_s = sum(part.seconds for part in (*alone.values(), *update)) + sum(one.exposed_s for one in sending)
    return StepTime((*passes.values(), *update), network, burn_in_s)


def _part(subject: Subject, name: Pass, rates: Rates) -> Part:
    times = subject.recipe.engine.accumulation
    operations = trace(subject, name, images_of(subject, name)).operations
    graphed = subject.recipe.engine.cuda_graphs and name.startswith("loss_")
    directions = ([o for o in operations if not o.backward], [o for o in operations if o.backward])
    forward, backward = (_work(direction, rates, times, graphed=graphed) for direction in directions)
    return Part(TITLES.get(name, name), forward, backward)


def _work(operations: Iterable[Operation], rates: Rates, times: int, *, graphed: bool) -> Work:
    flops = products = moving = 0.0
    count = 0
    for operation in operations:
        taken = rates.seconds(operation) * operation.count
        if rates.is_product(operation):
            products += taken
        else:
            moving += taken
        flops += operation.flops * operation.count
        count += operation.count
    launched = 0 if graphed else count
    return Work(flops * times, products * times, moving * times, launched * times * rates.launch_s, launched * times)


def _optimizer(subject: Subject, cluster: Cluster, rates: Rates) -> Part:
    """Norm of the gradient, AdamW on this rank's share, and adding gradients of several passes."""
    engine = subject.recipe.engine
    trained = sum(p.numel() for p in subject.student.parameters() if p.requires_grad)
    own = trained / cluster.ranks if engine.zero_stage > 0 else trained
    if engine.offload_optimizer:
        # Gradients to the host, the step there, weights back: over the link of a GPU to its host.
        moved = (efficiency.ADAMW_BYTES * own) / efficiency.HOST_MEMORY + 8 * own / efficiency.HOST_LINK
        return Part("optimizer, on the host", Work(moving_s=moved), Work())
    return Part("optimizer", Work(moving_s=rates.adamw_s(own) + rates.moving_s(4 * own)), Work())


def _average(subject: Subject, cluster: Cluster, rates: Rates) -> Part:
    trained = sum(p.numel() for p in subject.student.parameters() if p.requires_grad)
    own = trained / cluster.ranks if subject.recipe.engine.zero_stage == 3 else trained
    return Part("teacher's average", Work(moving_s=rates.moving_s(efficiency.LERP_BYTES * own)), Work())


def _network(
    traffic: Sequence[Traffic], cluster: Cluster, rates: Rates, passes: Mapping[Pass, Part]
) -> tuple[Sending, ...]:
    room = {
        "forward": sum(part.forward.seconds for name, part in passes.items() if name.startswith("loss_")),
        "backward": sum(part.backward.seconds for part in passes.values()),
        "teacher": sum(part.seconds for name, part in passes.items() if name == "teacher"),
    }
    found = []
    for one in traffic:
        taken = seconds(one, cluster, rates.network_share)
        hidden = 0.0
        if one.during is not None and rates.overlaps:
            last = seconds(scaled(one, 1 / max(1.0, one.calls)), cluster, rates.network_share)
            hidden = min(taken - last, room[one.during])
            room[one.during] -= hidden
        found.append(Sending(one.what, one.sent(cluster.ranks), taken, taken - hidden, one.during))
    return tuple(found)
