"""Weights of transformers' SegFormers, renamed to a segmenter's names."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from transformers import SegformerForSemanticSegmentation
from transformers.utils import logging as transformers_log

from maskmatch_scale.models.deferred import kept_whole
from maskmatch_scale.models.segformer.config import OFFICIAL
from maskmatch_scale.models.weights import MORE_THAN_TENSORS, read_weights, to_own_name

_STEM = "segformer.stages.0.patch_embeddings.proj.weight"


def segformer_weights(source: str | Path, config: Any) -> dict[str, Tensor]:
    """Weights of a SegFormer of transformers, in a segmenter's names (`backbone.…`, `head.…`).

    transformers reads them itself, so checkpoints of its versions 4 and 5, and encoders trained on ImageNet, all load.
    Tensors that the source does not hold are left out. Those that the model has in another shape, or not at all, are on
    the meta device, without values; but the first patch embedding has the channels of the source (`channels.adapt_stem`
    adapts it).

    Args:
        source: `segformer-b0` … `-b5` (the ImageNet encoders `nvidia/mit-b0` … of the hub), a folder, or a file.
        config: the model's `SegformerConfig`.

    Raises:
        ValueError: the source cannot be read; a tensor of the encoder is missing or of another shape.
    """
    model, info = _load(source, config)
    stems = [(stored, own) for key, stored, own in info["mismatched_keys"] if key == _STEM]
    if stems and stems[0][0][2:] == stems[0][1][2:]:
        # transformers keeps nothing of a tensor that does not fit, so it is read by a model of as many channels.
        config = copy.deepcopy(config)
        config.num_channels = stems[0][0][1]
        model, info = _load(source, config)
    absent = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
    wrong = sorted(key for key in absent if key.startswith("segformer."))
    if wrong:
        raise ValueError(f"pretrained: {str(source)!r} does not fit the backbone, e.g. {wrong[0]}; is it another size?")
    found = {to_own_name(key): value for key, value in model.state_dict().items() if key not in absent}
    unused = dict.fromkeys(info["unexpected_keys"], (0,))
    unused |= {key: tuple(shape) for key, shape, *_ in info["mismatched_keys"]}
    return found | {to_own_name(key): torch.empty(shape, device="meta") for key, shape in unused.items()}


def _load(source: str | Path, config: Any) -> tuple[Any, dict[str, Any]]:
    """A model of transformers with the weights of a source, and what transformers says of them."""
    state = None
    name: str | None = str(source).replace("segformer-", "nvidia/mit-") if source in OFFICIAL else str(source)
    try:
        with kept_whole(), _quiet():  # transformers loads in threads
            if Path(source).is_file():
                state, name = read_weights(Path(source)), None
            model, info = SegformerForSemanticSegmentation.from_pretrained(
                name,
                config=config,
                state_dict=state,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                weights_only=True,
            )
    except UnpicklingError:
        raise ValueError(f"pretrained: {str(source)!r} {MORE_THAN_TENSORS}") from None
    except OSError as error:
        raise ValueError(f"pretrained: transformers finds no weights at {name!r}: {error}") from error
    return model, info


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Without transformers' table of tensors that do not fit, from every rank: a segmenter says it in a line."""
    level, shows_progress = transformers_log.get_verbosity(), transformers_log.is_progress_bar_enabled()
    transformers_log.set_verbosity_error()
    transformers_log.disable_progress_bar()
    try:
        yield
    finally:
        transformers_log.set_verbosity(level)
        if shows_progress:
            transformers_log.enable_progress_bar()
