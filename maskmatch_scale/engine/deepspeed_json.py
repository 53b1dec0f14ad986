"""Merges the user's DeepSpeed JSON (`engine.deepspeed_json`) with the recipe's settings, and refuses contradictions.

DeepSpeed accepts most unknown keys without a message, and some known keys change what is trained. So only keys for
memory, communication and logging are handed on. Keys that the recipe decides may be in the file too, but must agree.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskmatch_scale.engine.setup import import_deepspeed
from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe import Recipe

_DECIDED = {
    "train_batch_size": "engine.micro_batch",
    "train_micro_batch_size_per_gpu": "engine.micro_batch",
    "gradient_accumulation_steps": "engine.accumulation",
    "gradient_clipping": "optim.clip_norm",
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer.device": "engine.offload_optimizer",
    "zero_optimization.offload_param.device": "engine.offload_parameters",
    "zero_optimization.cpu_offload": "engine.offload_optimizer",
    "zero_optimization.cpu_offload_param": "engine.offload_parameters",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
    "torch_autocast.enabled": "engine.precision",
    "torch_autocast.dtype": "engine.precision",
}
"""Keys of DeepSpeed that the recipe decides, with the recipe's key."""

_RECIPES_OWN = {"optimizer": "the section optim", "scheduler": "optim.schedule"}
"""Sections of DeepSpeed that may not be in the file, with the part of the recipe that has their settings."""

_PASSED = frozenset(
    {
        *("zero_optimization", "bf16", "fp16", "torch_autocast"),
        *("data_types", "communication_data_type", "prescale_gradients", "gradient_predivide_factor"),
        *("comms_logger", "wall_clock_breakdown", "memory_breakdown", "flops_profiler"),
    }
)
"""Top-level keys that are handed on to DeepSpeed."""

_WITHIN = {
    "bf16": {"enabled", "immediate_grad_update"},
    "data_types": {"grad_accum_dtype"},
    "fp16": {
        *("enabled", "loss_scale", "initial_scale_power", "loss_scale_window"),
        *("hysteresis", "consecutive_hysteresis", "min_loss_scale"),
    },
    "torch_autocast": {"enabled", "dtype", "lower_precision_safe_modules"},
}
"""Keys that are allowed in these sections. DeepSpeed has more: 16-bit masters and moments, which are not supported, and
a switch that would let it take a step with gradients that are not finite."""

_NOT_WITHIN_ZERO = {
    "load_from_fp32_weights": "it is for checkpoints of DeepSpeed's own, which a run does not write",
    "compute_grad_norm": "the gradient norm is recorded, and clipping needs it",
    "elastic_checkpoint": "it is for checkpoints of DeepSpeed's own, which a run does not write",
    "zenflow": "it replaces the optimizer",
}
"""Keys of `zero_optimization` that change what is trained or restored, and why they are refused."""


def merged(defaults: dict[str, Any], config: dict[str, Any], recipe: Recipe, world_size: int) -> dict[str, Any]:
    """The recipe's DeepSpeed config with what `engine.deepspeed_json` adds.

    Args:
        defaults: settings that the file may change.
        config: settings that follow from the recipe.
        recipe: of the run.
        world_size: number of ranks.

    Raises:
        UserError: the file cannot be read, has a key that is not handed on, or contradicts the recipe; the message
            names the file and the keys.
    """
    assert recipe.engine.deepspeed_json is not None
    path = Path(recipe.engine.deepspeed_json)
    given = _read(path)
    for key in given:
        if key in _RECIPES_OWN:
            raise UserError(f"{path}: {key!r} belongs to the recipe ({_RECIPES_OWN[key]}); take it out of the file")
        if key not in _PASSED and key not in _DECIDED:
            near = difflib.get_close_matches(key, sorted(_PASSED | set(_DECIDED)), 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{path}: {key!r} is not a setting that is handed on to DeepSpeed{hint}")
    _check_sections(path, given)
    _check_gradients(path, given, recipe)
    decided = dict(_leaves(config))
    decided["gradient_accumulation_steps"] = recipe.engine.accumulation  # DeepSpeed itself counts none
    decided["train_batch_size"] = recipe.engine.micro_batch * recipe.engine.accumulation * world_size
    for key, value in _leaves(given):
        if key not in _DECIDED or value == "auto":
            continue
        of_recipe = decided.get(key, _absent(key))
        if value != of_recipe:
            raise UserError(
                f"{path}: {key}={json.dumps(value)}, but the recipe's {_DECIDED[key]} makes it "
                f"{json.dumps(of_recipe)}; change one of the two, or leave {key} out of the file"
            )
    whole = over(over(defaults, _without_auto(given)), config)
    _check_schemas(path, whole)
    return whole


def _absent(key: str) -> object:
    """The value that a key has in DeepSpeed when the recipe's settings leave it out."""
    return "none" if key.endswith(".device") else "bfloat16" if key.endswith(".dtype") else False


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"engine.deepspeed_json={path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"engine.deepspeed_json={path}: not readable as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"engine.deepspeed_json={path}: it must be an object of DeepSpeed settings")
    return content


def _leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested settings by its dotted key."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def over(under: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Two nested settings merged; where both have a key, ``top`` wins."""
    both = dict(under)
    for key, value in top.items():
        below = under.get(key)
        both[key] = over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return {key: value for key, value in both.items() if key != "train_batch_size"}  # it follows from other keys


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that are "auto", which is for libraries that fill in DeepSpeed's settings."""
    plain = {key: _without_auto(value) if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in plain.items() if value != "auto"}


def _check_sections(path: Path, given: dict[str, Any]) -> None:
    """Refuse keys and values that DeepSpeed would accept without a message, or fail at later."""
    for name in ("zero_optimization", *_WITHIN):
        section = given.get(name, {})
        if not isinstance(section, dict):
            raise UserError(f"{path}: {name}={json.dumps(section)}; it must be an object")
        for key in section:
            if name in _WITHIN and key not in _WITHIN[name]:
                raise UserError(f"{path}: {name}.{key} is not handed on; there are {', '.join(sorted(_WITHIN[name]))}")
            if name == "zero_optimization" and key in _NOT_WITHIN_ZERO:
                raise UserError(f"{path}: {name}.{key} is refused: {_NOT_WITHIN_ZERO[key]}; take it out of the file")
    dtype = given.get("communication_data_type")
    if dtype not in (None, "auto", "fp32", "fp16", "bf16"):
        raise UserError(f"{path}: communication_data_type={json.dumps(dtype)}; it must be fp32, fp16 or bf16")


def _check_gradients(path: Path, given: dict[str, Any], recipe: Recipe) -> None:
    """Refuse ways to add and average gradients at which DeepSpeed fails late, or goes wrong in silence."""
    engine, zero = recipe.engine, given.get("zero_optimization", {})
    if zero.get("overlap_comm") is True and engine.zero_stage < 2:
        raise UserError(
            f"{path}: zero_optimization.overlap_comm=true with engine.zero_stage={engine.zero_stage}: gradients are "
            "averaged in the step there, after all views; leave it out, or use engine.zero_stage=2"
        )
    if zero.get("zero_quantized_gradients") is True and engine.precision != "fp16":
        raise UserError(
            f"{path}: zero_optimization.zero_quantized_gradients=true with engine.precision={engine.precision}: "
            "DeepSpeed's kernel reads gradients as fp16, whatever they are; leave it out, or use engine.precision=fp16"
        )
    dtype = given.get("data_types", {}).get("grad_accum_dtype")
    allowed = ("fp32", engine.precision if engine.precision in ("bf16", "fp16") else "fp32")
    if dtype not in (None, "auto", *allowed):
        raise UserError(
            f"{path}: data_types.grad_accum_dtype={json.dumps(dtype)} with engine.precision={engine.precision}; "
            f"it must be {' or '.join(dict.fromkeys(allowed))}"
        )


def _check_schemas(path: Path, config: dict[str, Any]) -> None:
    """Run DeepSpeed's own checks of its sections, before anything is built."""
    import_deepspeed()
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    schemas = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for name, schema in schemas.items():
        try:
            schema(**config.get(name, {}))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, (name, *first["loc"])))
            raise UserError(f"{path}: {key}: {first['msg']}") from None
