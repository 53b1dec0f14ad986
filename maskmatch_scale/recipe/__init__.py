"""The recipe of a run: its keys, loading it, and checking it."""

from maskmatch_scale.recipe.learning import MaskRecipe, MethodRecipe, OptimRecipe, StrongViewRecipe
from maskmatch_scale.recipe.load import load_recipe, parse_recipe
from maskmatch_scale.recipe.recording import RecordRecipe
from maskmatch_scale.recipe.running import EvaluationRecipe, RunRecipe
from maskmatch_scale.recipe.sections import DataRecipe, EngineRecipe, ModelRecipe, Recipe, RecipeError, SourceRecipe

__all__ = [
    "DataRecipe",
    "EngineRecipe",
    "EvaluationRecipe",
    "MaskRecipe",
    "MethodRecipe",
    "ModelRecipe",
    "OptimRecipe",
    "Recipe",
    "RecipeError",
    "RecordRecipe",
    "RunRecipe",
    "SourceRecipe",
    "StrongViewRecipe",
    "load_recipe",
    "parse_recipe",
]
