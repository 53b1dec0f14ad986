"""Reading a recipe: a YAML file, ``section.key=value`` overrides, and a message of one line for every mistake.

OmegaConf reads and merges; pydantic checks types and values. Every mistake is one :class:`RecipeError` that names the
key, its value, and the nearest valid key or what is allowed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from yaml import YAMLError

from maskmatch_scale.recipe.sections import Recipe, RecipeError
from maskmatch_scale.redact import redacted_values

_SOURCES = ("data.labelled", "data.unlabelled")
"""Keys that hold lists of sources."""


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file, apply ``section.key=value`` overrides, and check the result.

    Args:
        path: YAML file.
        overrides: for example ``["run.steps=20", "method.scales=[0.5,1]", "method.mask.keep=null"]``.

    Returns:
        The recipe, frozen.

    Raises:
        RecipeError: one line that names the key, its value and the nearest valid key or what is allowed.
    """
    path = Path(path)
    if path.is_dir():
        inside = path / "recipe.yaml"
        what = f"name {inside}" if inside.is_file() else "name a YAML file; configs/ has examples"
        raise RecipeError(f"recipe {path}: a folder; {what}")
    if not path.is_file():
        raise RecipeError(f"recipe {path}: no such file")
    try:
        config = OmegaConf.load(path)
        if not isinstance(config, DictConfig) or (config and not any(map(OmegaConf.is_dict, config.values()))):
            raise RecipeError(f"recipe {path}: not a mapping of sections; see configs/ for examples")
        content = OmegaConf.to_container(_merged(config, overrides), resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"recipe {path}: {' '.join(str(error).split())}") from None
    return parse_recipe(content, source=str(path))


def _merged(config: DictConfig, overrides: Iterable[str]) -> DictConfig:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {override!r}: write it as section.key=value")
        given = OmegaConf.from_dotlist([override])
        config = OmegaConf.merge(config, given)
        if OmegaConf.select(given, key) == {}:  # merged, it would change nothing
            OmegaConf.update(config, key, {}, merge=False)
    return config


def parse_recipe(content: object, source: str = "recipe", overrides: Iterable[str] = ()) -> Recipe:
    """Check plain nested data as :func:`load_recipe` does. Messages begin with ``source``.

    Args:
        content: sections, as a recipe file has them.
        source: where they are from.
        overrides: as of :func:`load_recipe`.

    Raises:
        RecipeError: as :func:`load_recipe`.
    """
    try:
        if overrides:
            content = OmegaConf.to_container(_merged(OmegaConf.create(content), overrides), resolve=True)
    except (YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"{source}: {' '.join(str(error).split())}") from None
    try:
        # As JSON, so that strict typing still takes a YAML list for a tuple.
        return Recipe.model_validate_json(json.dumps(content))
    except TypeError as error:
        raise RecipeError(f"{source}: {error}") from None
    except ValidationError as error:
        raise RecipeError(f"{source}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """One mistake as one line. Unknown keys are named first, because they often explain missing ones."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    first = details[0]
    key = _dotted(first["loc"])
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}={_shown(first['input'])}; did you mean {_nearest(key)}?{more}"
    if first["type"] == "missing":
        return f"missing key {key}: it has no default{more}"
    message = first["msg"].removeprefix("Value error, ")
    if key in _SOURCES and first["type"] == "tuple_type":
        message = f"it must be a list of sources, such as '{key}=[{{root: FOLDER}}]'"
    return message + more if not key else f"{key}={_shown(first['input'])}: {message}{more}"


def _nearest(key: str) -> str:
    """The valid key that is most similar to an unknown one, by its name or by words of its docstring."""
    section, _, name = key.rpartition(".")
    words = name.replace("_", " ").lower()
    docs = {full: field.description or "" for full, field in _fields(Recipe)}
    valid = sorted({prefix for full in docs for prefix in _prefixes(full)})

    def likeness(candidate: str) -> float:
        its_section, _, its_name = candidate.rpartition(".")
        named = difflib.SequenceMatcher(None, name, its_name).ratio()
        described = max(
            (difflib.SequenceMatcher(None, words, phrase).ratio() for phrase in _phrases(docs, candidate, words)),
            default=0.0,
        )
        return max(named, 0.9 * described) + 0.2 * (its_section == section)

    return max(valid, key=likeness)


def _phrases(docs: Mapping[str, str], key: str, like: str) -> Iterator[str]:
    """All sequences of words in a key's docstring that have as many words as ``like``, if ``like`` has at least two."""
    count = len(like.split())
    words = docs.get(key, "").lower().replace(".", " ").split()
    if count >= 2:
        for start in range(len(words) - count + 1):
            yield " ".join(words[start : start + count])


def _dotted(location: Sequence[str | int]) -> str:
    """Location of a mistake as a dotted key, without pydantic's names of union members and numbers of list items."""
    key = ""
    valid = {prefix for name in _keys(Recipe) for prefix in _prefixes(name)}
    for part in location:
        longer = f"{key}.{part}" if key else str(part)
        if key in valid and longer not in valid and _is_leaf(key):
            break
        key = longer
    return key


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _is_leaf(key: str) -> bool:
    return key in set(_keys(Recipe))


def _fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the recipe, dotted, with its field."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _keys(section: type[BaseModel]) -> Iterator[str]:
    return (key for key, _ in _fields(section))


def _shown(value: object) -> str:
    return json.dumps(redacted_values(value)) if not isinstance(value, Mapping) else "{…}"
