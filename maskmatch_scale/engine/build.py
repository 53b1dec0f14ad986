"""Builds the engine that a recipe names. Only the library of that engine is imported.

Decision: docs/decisions/0020-engine-as-a-protocol.md.
"""

from __future__ import annotations

import pkgutil

from torch import nn

from maskmatch_scale.engine.protocol import Engine
from maskmatch_scale.engine.ranks import Runtime
from maskmatch_scale.recipe import Recipe
from maskmatch_scale.recipe.engines import ENGINES


def build_engine(module: nn.Module, student: nn.Module, recipe: Recipe, runtime: Runtime) -> Engine:
    """Build the engine of `engine.library`.

    Args:
        module: called once for each view; its ``segmenter`` is the student whose parameters are optimised.
        student: that segmenter.
        recipe: of the run.
        runtime: this rank.
    """
    return _engine_class(recipe)(module, student, recipe, runtime)


def check_settings(recipe: Recipe, world_size: int) -> None:
    """Check the settings of the engine's own library, before anything is built.

    Raises:
        UserError: names the file and its key.
    """
    _engine_class(recipe).check_settings(recipe, world_size)


def _engine_class(recipe: Recipe) -> type[Engine]:
    found: type[Engine] = pkgutil.resolve_name(ENGINES[recipe.engine.library])
    return found
