"""ZeRO-3 shards of a model whose weights are made one at a time (`models/deferred.py`).

Each weight is made whole on every rank, DeepSpeed's own functions cut it, and the whole is freed before the next one.
This is what DeepSpeed does with a model that is there whole. It is not `with deepspeed.zero.Init():`, which replaces
functions that libraries build and initialise their modules with.

Decision: docs/decisions/0039-deferred-weights-at-zero-3.md.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from maskmatch_scale.engine.setup import import_deepspeed
from maskmatch_scale.models.deferred import DeferredWeights


def shard_deferred(module: nn.Module, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Shard the parameters of a model with deferred weights, on the engine's device; its buffers stay where they are.

    All ranks call it together, before `deepspeed.initialize`.

    Args:
        module: its ``deferred`` makes the weights that are on the meta device. It is None afterwards, and parameters
            are other objects than before.
        config: DeepSpeed's settings, those that the module's engine is then made with.
        dtype: of the weights in that engine.
    """
    weights: DeferredWeights | None = getattr(module, "deferred", None)
    if weights is None:
        return
    first: Any = None
    for prefix, owner in module.named_modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            path = f"{prefix}.{name}" if prefix else name
            value = weights.make(path) if path in weights else parameter.detach()
            whole: Any = nn.Parameter(value.to(dtype), parameter.requires_grad)
            del value
            owner._parameters[name] = whole
            if first is None:
                # "Partition an already-allocated model": no function of any library is replaced, except that linear
                # layers get DeepSpeed's own backward, as they do for every model at this stage.
                holder = nn.ParameterList([whole])
                import_deepspeed().zero.Init(module=holder, config_dict_or_path=copy.deepcopy(config))
                first = whole
            else:
                first.convert_to_zero_parameters(param_list=[whole])
    module.deferred = None  # type: ignore[assignment]
