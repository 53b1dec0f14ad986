"""Models with fewer blocks: blocks that are alike cost alike, so a deep model need not be run whole to be planned."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

from torch import nn

from maskmatch_scale.models import Segmenter


def alike_blocks(segmenter: Segmenter) -> int:
    """How many blocks of the backbone are alike: the most that one of its lists of blocks has."""
    return len(_largest_group(segmenter)[1])


def shortened(segmenter: Segmenter, kept: int) -> Segmenter:
    """A copy in which only the first ``kept`` of the blocks that are alike are left."""
    name, alike = _largest_group(segmenter)
    if not alike:
        return copy.deepcopy(segmenter)
    blocks: Any = segmenter.backbone.get_submodule(name)
    # Blocks that are left out are not copied first, which would take longer than running the others.
    spared: dict[int, Any] = {id(blocks[number]): blocks[number] for number in alike[kept:]}
    short = copy.deepcopy(segmenter, spared)
    left: Any = short.backbone.get_submodule(name)
    for number in reversed(alike[kept:]):
        del left[number]
    return short


def _largest_group(segmenter: Segmenter) -> tuple[str, list[int]]:
    """The name of a list of blocks in the backbone, and the places in it of those that are alike."""
    largest: tuple[str, list[int]] = "", []
    for name, blocks in segmenter.backbone.named_modules():
        if isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks) > len(largest[1]):
            groups = defaultdict(list)
            for number, block in enumerate(blocks):
                if not block._forward_hooks:  # one whose output is a level of the features stays
                    groups[_kind(block)].append(number)
            found = max(groups.values(), key=len, default=[])
            if len(found) > len(largest[1]):
                largest = name, found
    return largest


def _kind(block: nn.Module) -> Hashable:
    """What decides which operations a block runs, on tensors of which sizes."""
    return tuple((name, type(module), _sizes(module), _settings(module)) for name, module in block.named_modules())


def _sizes(module: nn.Module) -> Hashable:
    own = (parameter for parameter in module._parameters.values() if parameter is not None)
    return tuple((tuple(parameter.shape), parameter.requires_grad) for parameter in own)


def _settings(module: nn.Module) -> Hashable:
    """Of numbers with a point only whether they are 0: rates of stochastic depth differ from block to block."""
    kept = ((name, value) for name, value in sorted(vars(module).items()) if isinstance(value, int | float | str))
    return tuple((name, bool(value) if isinstance(value, float) else value) for name, value in kept)
