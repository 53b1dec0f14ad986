"""A recipe to sweep."""

import pytest


@pytest.fixture
def recipe_file(make_recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(make_recipe(engine={"precision": "fp32"}).to_yaml())
    return file
