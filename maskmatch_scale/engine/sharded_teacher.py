"""The teacher at ZeRO-3: each rank keeps its shard of the average, in fp32, and averages it by itself.

The shards are cut as DeepSpeed cuts the student's, so an update sends nothing. A forward gathers the weights
(`gathering.py`), each once for all forwards within :meth:`ShardedTeacher.gathered`, in the precision of the products.

Decision: docs/decisions/0018-teacher-copied-before-averaged-after.md.
Decision: docs/decisions/0038-own-gathering-for-the-teacher.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.conv import _ConvNd

from maskmatch_scale.engine.ema import Teacher
from maskmatch_scale.engine.gathering import Bucket, Gathering, Shard
from maskmatch_scale.engine.parts import Part
from maskmatch_scale.engine.precision import autocast
from maskmatch_scale.engine.protocol import Engine
from maskmatch_scale.engine.ranks import require_device
from maskmatch_scale.engine.zero_parts import local_master
from maskmatch_scale.models.deferred import DeferredWeights


class ShardedTeacher(Teacher):
    """An average in shards that lie as the student's do.

    Args:
        teacher: the average, fp32, in host memory: whole, or with weights that its ``deferred`` makes one at a time.
            Its parameters are emptied; their parts move to the shards.
        engine: of the student, which DeepSpeed has sharded.
        device: of its forwards.
        bucket_size: largest number of elements that are gathered together; a larger weight is gathered by itself.
        max_live: largest number of elements that are kept gathered, see `Gathering`.
    """

    def __init__(
        self, teacher: nn.Module, engine: Engine, device: torch.device, *, bucket_size: int, max_live: int
    ) -> None:
        super().__init__(teacher, engine)
        self._device = device
        self._shards = {name: Shard(like) for name, like in self.student.named_parameters()}
        whole = dict(teacher.named_parameters())
        assert self._shards.keys() == whole.keys(), "the teacher is no copy of the student"
        weights: DeferredWeights | None = getattr(teacher, "deferred", None)
        _replace_parameters(teacher, {p: nn.Parameter(torch.empty(0, device=device), False) for p in whole.values()})
        self._parameters = dict(teacher.named_parameters())
        buckets = []
        for dtype, names in self._bucket_names(bucket_size):
            shards = [self._shards[name] for name in names]
            bucket = Bucket(shards, dtype, device, offloaded=engine.recipe.engine.offload_parameters)
            buckets.append((bucket, [self._parameters[name] for name in names]))
        for name in self._parameters:  # a weight that is made one at a time is whole here alone
            parameter, shard = whole.pop(name), self._shards[name]
            if weights is None or name not in weights:
                shard.put(parameter)
                continue
            # Rank 0's numbers for all, as DeepSpeed does it with the student's: files may differ between machines.
            value = require_device(weights.make(name).to(device), device)
            dist.broadcast(value, dist.get_global_rank(shard.group, 0), group=shard.group)
            shard.put(value)
        teacher.deferred = None  # type: ignore[assignment]
        teacher.to(device)
        self._gathering = Gathering(teacher, buckets, max_live)

    def gathered(self) -> AbstractContextManager[None]:
        """See `StoredTeacher`."""
        return self._gathering.kept()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Forward in the student's precision, which gathers: all ranks must call it equally often."""
        with self._gathering.forward(), autocast(images.device, self._dtype):
            logits: Tensor = self.module(images)
        return logits

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """One multi-tensor lerp of this rank's shards; nothing is sent."""
        pairs = zip(self._shards.values(), self.student.parameters(), strict=True)
        trained = [(shard.values, parameter) for shard, parameter in pairs if parameter.requires_grad]
        # To the host it must be a blocking copy: the values are used there at once.
        masters = [
            local_master(parameter).to(shard.device, non_blocking=shard.device.type != "cpu")
            for shard, parameter in trained
        ]
        shards = [shard for shard, _ in trained]
        torch._foreach_lerp_(shards, masters, 1 - decay)
        self._update_buffers(decay)

    def _held(self) -> Iterator[Part]:
        for name, shard in self._shards.items():
            yield Part(name, tuple(shard.shape), shard.start, shard.values[: shard.held])

    def _bucket_names(self, most: int) -> Iterator[tuple[torch.dtype, list[str]]]:
        """Names of neighbouring parameters of one dtype and one part of the model, up to ``most`` elements."""
        products = set(product_weights(self.module)) if self._dtype else set()
        open_buckets: dict[tuple[str, torch.dtype], list[str]] = {}
        for name in self._shards:
            dtype = self._dtype if self._dtype and name in products else torch.float32
            # By part (backbone, head, context): a teacher's forward never reads the context decoder.
            names = open_buckets.setdefault((name.partition(".")[0], dtype), [])
            if names and sum(self._shards[one].shape.numel() for one in (*names, name)) > most:
                yield dtype, list(names)
                names.clear()
            names.append(name)
        for (_, dtype), names in open_buckets.items():
            yield dtype, names


def _replace_parameters(module: nn.Module, others: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Put other parameters in the places of a module's own."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            owner._parameters[name] = others[parameter]


def product_weights(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the weights that autocast converts whenever they are used: those of linear layers and convolutions.

    Not their biases, which DeepSpeed's replacement of `F.linear` adds in fp32; and not the weights of a module that
    says `weights_in_fp32`, because it computes with them before autocast sees them.
    """
    if getattr(module, "weights_in_fp32", False):
        return
    if isinstance(module, nn.Linear | _ConvNd):
        yield f"{prefix}weight"
    for name, child in module.named_children():
        yield from product_weights(child, f"{prefix}{name}.")
