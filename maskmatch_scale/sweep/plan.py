"""Which runs a sweep has: all combinations of values, and the name of each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from pathlib import Path

from maskmatch_scale.errors import UserError
from maskmatch_scale.recipe import Recipe, load_recipe
from maskmatch_scale.record.run_folder import RunFolder

_LONGEST_NAME = 150
"""Letters of a folder's name; most file systems take 255 bytes."""
_READABLE = re.compile(r"[\w.+-]*|\[[\w.+]+(, ?[\w.+]+)*\]", re.ASCII)
"""Values that their name in a folder tells: words, numbers, and lists of them. Of all others it has a hash too."""


@dataclass(frozen=True)
class Trial:
    """One combination of values."""

    name: str
    """`key=value` of the keys that have several values, with commas between them."""
    overrides: tuple[str, ...]
    """All overrides of the recipe, `run.dir` too."""
    recipe: Recipe

    @property
    def folder(self) -> RunFolder:
        """Its run directory."""
        return RunFolder(Path(self.recipe.run.dir))


def plan(recipe: Path, overrides: Sequence[str], out: Path) -> list[Trial]:
    """All combinations of values, in the order in which they are written; nothing is written.

    Args:
        recipe: YAML file.
        overrides: `section.key=value`, or `section.key=value,value,…`. Commas within brackets, braces or quotes
            belong to a value.
        out: folder of the run directories.

    Raises:
        UserError: no key has several values, one of them is empty, a key or value is given twice, a key that has
            several is part of another key, or a combination is not a valid recipe.
    """
    choices: dict[str, list[str]] = {}
    for override in overrides:
        key, equals, values = override.partition("=")
        if key == "run.dir":
            raise UserError(f"{override}: every run of a sweep has its own run.dir, below --out")
        if key in choices:
            raise UserError(f"{key} is given twice; write all its values with commas: {key}=…,…")
        # One without "=" is refused by load_recipe.
        parts = _split(values)
        if len(parts) > 1 and not all(part.strip() for part in parts):
            raise UserError(f"{override}: there is no value on one side of a comma; for none, write null")
        choices[key] = [f"{key}={value}" for value in parts] if equals else [override]
    keys = [key for key, settings in choices.items() if len(settings) > 1]
    if not keys:
        raise UserError("no key has several values; separate them by commas: maskmatch sweep RECIPE optim.lr=1e-5,1e-4")
    for key in keys:
        for other in choices:
            longer, shorter = max(key, other, key=len), min(key, other, key=len)
            if longer.startswith(f"{shorter}."):
                raise UserError(f"{longer} is part of {shorter}, so one would replace values of the other; give one")
    trials = []
    for settings in product(*choices.values()):
        name = _name(settings[place] for place, key in enumerate(choices) if key in keys)
        # In quotes, since the value is read as YAML: " #" would begin a comment, ": " make a mapping.
        given = (*settings, f"run.dir={json.dumps(str(out / name), ensure_ascii=False)}")
        trials.append(Trial(name, given, load_recipe(recipe, given)))
    folders = [trial.folder.path for trial in trials]
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise UserError(f"two runs would have the folder {folder}; give every value of a key once")
    return trials


def _split(values: str) -> list[str]:
    """The parts between commas that are in no brackets, braces or quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in values:
        if letter == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += letter
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
    return parts


def _name(settings: Iterator[str]) -> str:
    """A file name that says the settings, unlike that of any other settings. What it cannot say is in hashes."""
    whole = ",".join(map(_word, settings))
    return whole if len(whole) <= _LONGEST_NAME else f"{whole[:_LONGEST_NAME]}-{_hash(whole)}"


def _word(setting: str) -> str:
    key, _, value = setting.partition("=")
    bare = re.sub(r"[\s\[\]{}\"']", "", value)
    word = f"{key}=" + re.sub(r"[^\w.=+-]+", "-", bare, flags=re.ASCII)
    return word if _READABLE.fullmatch(value) else f"{word}-{_hash(value)}"


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:8]
