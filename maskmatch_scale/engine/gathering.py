"""Gathers the sharded weights of a module as its forward reads them, for weights that need no gradient.

A module finds its parameters in its dictionary `_parameters`. Here this dictionary is one that gives, while a forward
runs, the whole weight instead of the parameter. So a weight is gathered by whatever code reads it, in whatever module.

Weights are gathered in buckets of neighbouring parameters. The next bucket, in the order of the first forward, comes
while one is computed with. All ranks read the weights in the same order, so they agree on the order of collectives.

Decision: docs/decisions/0038-own-gathering-for-the-teacher.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from maskmatch_scale.engine.ranks import require_device

_IN_USE = 3
"""Buckets there at once that are not kept: of products, of other weights, and the one that comes next."""


class Shard:
    """This rank's part of a weight that is cut as DeepSpeed has cut ``like``, a parameter of the same shape."""

    def __init__(self, like: Any) -> None:
        self.shape = torch.Size(like.ds_shape)
        self.group = like.ds_process_group
        self.size = int(like.ds_tensor.ds_numel)
        self.start = min(self.size * dist.get_rank(self.group), self.shape.numel())
        """Place of the first element in the flattened weight."""
        self.held = min(self.size, self.shape.numel() - self.start)
        """How many elements of the weight lie here; the rest is padding."""
        self.values = torch.empty(0)
        """fp32 (size,)."""

    def put(self, whole: Tensor) -> None:
        """Copy this rank's part of a whole weight."""
        self.values[: self.held].copy_(whole.detach().flatten()[self.start : self.start + self.held])

    def whole_of(self, parts: Tensor) -> Tensor:
        """The weight, as a view of the parts (ranks, size) of all ranks."""
        return parts.view(-1)[: self.shape.numel()].view(self.shape)


class Bucket:
    """Shards that are gathered together.

    Args:
        shards: of neighbouring weights; their values are given memory, one piece for the whole bucket.
        dtype: in which they are sent, and read in a forward.
        device: on which they are gathered.
        offloaded: whether the shards lie in host memory.
    """

    def __init__(self, shards: Sequence[Shard], dtype: torch.dtype, device: torch.device, *, offloaded: bool) -> None:
        self._shards, self._dtype, self._device, self._group = shards, dtype, device, shards[0].group
        self._sizes = [shard.size for shard in shards]
        pinned = offloaded and device.type == "cuda"
        self._values = torch.zeros(sum(self._sizes), device="cpu" if offloaded else device, pin_memory=pinned)
        for shard, values in zip(shards, torch.split(self._values, self._sizes), strict=True):
            shard.values = values
        self.numel = sum(shard.shape.numel() for shard in shards)
        self.place: int | None = None
        """In the order of the first forward; None: not read yet."""
        self.wholes: list[Tensor] = []
        """The weights, if they are there."""
        self._coming: tuple[Any, Tensor, Tensor] | None = None

    def start(self) -> None:
        """Begin to gather; all ranks call it together. The device waits for nothing yet."""
        own = self._values.to(self._device, non_blocking=True).to(self._dtype)
        parts = own.new_empty(dist.get_world_size(self._group), len(own))
        require_device(own, self._device)
        work = dist.all_gather_into_tensor(parts.view(-1), own, group=self._group, async_op=True)
        self._coming = work, own, parts

    def finish(self) -> None:
        """Wait (on a GPU: the device, not the host) until the weights are there."""
        if self._coming is None:
            return
        (work, _, parts), self._coming = self._coming, None
        work.wait()
        pieces = [parts]
        if len(self._sizes) > 1:
            pieces = [parts.new_empty(len(parts), size) for size in self._sizes]
            torch.split_with_sizes_copy(parts, self._sizes, dim=1, out=pieces)
        self.wholes = [shard.whole_of(piece) for shard, piece in zip(self._shards, pieces, strict=True)]

    def release(self) -> None:
        """Forget the weights."""
        if self._coming is not None:
            self._coming[0].wait()
            self._coming = None
        self.wholes = []


class Gathering:
    """Buckets, and which of them stay gathered from one forward to the next.

    Forwards read them in turn, so the one that was read longest ago is needed soonest. So the first ones that fit are
    kept, and the others pass through.

    Args:
        module: whose weights lie in the buckets.
        buckets: each with its parameters.
        max_live: elements that may be there at once.
    """

    def __init__(
        self, module: nn.Module, buckets: Sequence[tuple[Bucket, Sequence[nn.Parameter]]], max_live: int
    ) -> None:
        self._buckets = [bucket for bucket, _ in buckets]
        self._found = {p: (bucket, i) for bucket, parameters in buckets for i, p in enumerate(parameters)}
        self._max_live = max_live
        self._most_kept = 0
        self._order: list[Bucket] = []
        self._kept: list[Bucket] = []
        self._passing: list[Bucket] = []  # the one that was used last is last
        self._users = 0
        self._reached = -1
        self._forward = False
        for part in module.modules():
            part._parameters = _Whole(part._parameters, self._whole)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What is gathered in the body is kept until its end."""
        if not self._users:
            # Those that a forward reads; before the first one all that there are.
            sizes = [bucket.numel for bucket in self._order] or [bucket.numel for bucket in self._buckets]
            everything = sum(sizes) <= self._max_live
            self._most_kept = self._max_live - (0 if everything else _IN_USE * max(sizes))
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                for bucket in self._kept + self._passing:
                    bucket.release()
                self._kept, self._passing = [], []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """In the body weights are read whole; all ranks read them in the same order."""
        with self.kept():
            self._forward, self._reached = True, -1
            try:
                yield
            finally:
                self._forward = False

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        if not self._forward:
            return parameter
        bucket, number = self._found[parameter]
        if bucket.place is None:
            bucket.place = len(self._order)
            self._order.append(bucket)
        self._ask(bucket)
        bucket.finish()
        if bucket.place > self._reached:
            self._reached = bucket.place
            for following in self._order[bucket.place + 1 : bucket.place + 2]:
                self._ask(following)
        return bucket.wholes[number]

    def _ask(self, bucket: Bucket) -> None:
        """Begin to gather a bucket that is not there."""
        if bucket in self._kept:
            return
        if bucket in self._passing:
            self._passing.remove(bucket)
            self._passing.append(bucket)
            return
        among = self._kept
        if sum(one.numel for one in among) + bucket.numel > self._most_kept:
            among = self._passing
            if len(among) == _IN_USE:
                among.pop(0).release()
        among.append(bucket)
        bucket.start()


class _Whole(dict[str, "nn.Parameter | None"]):
    """A module's parameters. Reading one by its name gives what ``read`` makes of it."""

    def __init__(self, own: dict[str, nn.Parameter | None], read: Callable[[nn.Parameter], Tensor]) -> None:
        super().__init__(own)
        self._read = read

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        return parameter if parameter is None else self._read(parameter)
