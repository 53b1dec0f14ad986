"""The engine that a recipe names."""

from __future__ import annotations

from torch import nn

from maskmatch_scale.engine.protocol import Engine
from maskmatch_scale.engine.setup import Runtime
from maskmatch_scale.recipe import Recipe


def build_engine(module: nn.Module, student: nn.Module, recipe: Recipe, runtime: Runtime) -> Engine:
    """DeepSpeed's or accelerate's; only the one that is used is imported.

    Args:
        module: called once a micro-batch; its ``segmenter`` is the student whose parameters are optimised.
        student: that segmenter.
        recipe: of the run.
        runtime: this rank.
    """
    if recipe.engine.library == "accelerate":
        from maskmatch_scale.engine.ddp import DdpEngine

        return DdpEngine(module, student, recipe, runtime)
    from maskmatch_scale.engine.zero import ZeroEngine

    return ZeroEngine(module, student, recipe, runtime)


def check_settings(recipe: Recipe, world_size: int) -> None:
    """Look for mistakes in settings of the engine's own library, before anything is built.

    Raises:
        UserError: names the file and its key.
    """
    if recipe.engine.deepspeed_json:
        from maskmatch_scale.engine.zero import deepspeed_config

        deepspeed_config(recipe, world_size)
