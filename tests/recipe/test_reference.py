"""docs/recipe.md is what its generator prints, and has every key with its default and a meaning."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field

from maskmatch_scale.recipe import parse_recipe
from maskmatch_scale.recipe.reference import describe, main, page, sections
from maskmatch_scale.recipe.values import ScaleRange, SidesPx

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipe.md"


def _flat(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_the_committed_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "docs/recipe.md is old: python -m maskmatch_scale.recipe.reference docs/recipe.md"
    )


def test_every_key_stands_there_once_in_order_with_its_default():
    smallest = {"data": {"root": "-"}, "model": {"backbone": "-"}, "run": {"dir": "-", "steps": 0, "epochs": 1.0}}
    recipe = dict(_flat(parse_recipe(smallest).model_dump(mode="json")))
    keys = [key for name, _, keys in sections() if "[]" not in name for key in keys]
    by_section = sorted(recipe, key=lambda name: [key.name for key in keys].index(name))
    assert [key.name for key in keys] == by_section
    for key in keys:
        if key.default == "required":
            assert recipe[key.name] == "-"
        elif key.name != "run.epochs":
            assert yaml.safe_load(key.default.strip("`")) == recipe[key.name], key.name
    written = [line.split("|")[1].strip(" `") for line in page().splitlines() if line.startswith("| `")]
    entries = [key.name for name, _, keys in sections() if "[]" in name for key in keys]
    assert entries == ["root", "shards", "where", "part", "labels", "stream", "name", "weight"]
    assert sorted(written) == sorted([*by_section, *entries])


def test_every_key_and_section_has_a_docstring():
    for name, doc, keys in sections():
        assert doc, name
        for key in keys:
            assert key.meaning, key.name


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (bool, "`true` or `false`"),
        (str | None, "text or `null`"),
        (Annotated[float, Field(ge=0, le=1)], "share 0–1"),
        (Annotated[float, Field(gt=0, le=1)] | None, "number > 0, ≤ 1 or `null`"),
        (Annotated[int, Field(ge=2, le=255)], "integer 2–255"),
        (Literal["a", "b"], "one of `a`, `b`"),
        (tuple[Literal["a", "b"], ...], "list of any of `a`, `b`"),
        (SidesPx, "integer ≥ 1, or two of them"),
        (ScaleRange, "two numbers > 0, ascending"),
        (Annotated[tuple[float, ...], Field(min_length=1)], "list of one or more numbers"),
    ],
)
def test_types_in_words(annotation, words):
    assert describe(annotation) == words


def test_a_type_without_words_is_an_error():
    with pytest.raises(TypeError, match="bytes"):
        describe(bytes)


def test_the_command_writes_or_prints(tmp_path, capsys):
    assert main([str(tmp_path / "recipe.md")]) == 0
    assert (tmp_path / "recipe.md").read_text(encoding="utf-8") == page()
    assert main([]) == 0
    assert capsys.readouterr().out == page()
    assert main(["--help"]) == 2
    assert "FILE.md" in capsys.readouterr().err
