"""Blocks of code in a page of the documentation, and what the page says about running them.

Comments before a block, which a reader does not see, apply to that block:

    <!-- page test: prepare photos -->                   make data first: a function of prepared.py
    <!-- page test: serve hub -->                        from here to the end of the page: a server of served.py
    <!-- page test: file configs/mine.yaml -->           the block is the content of this file
    <!-- page test: keys of a recipe -->                 the block is some sections of a recipe, which are read
    <!-- page test: continues -->                        one Python program with the block before
    <!-- page test: replace `steps: 20000` with `steps: 2` -->       so that it is small and fast
    <!-- page test: not run: it needs two GPUs -->       and why not

A `bash` or `python` block is run; a `yaml` or `json` block must be a file or keys, or say why it is neither. Blocks
without a language, or of other languages, are not commands.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf

from maskmatch_scale.recipe import parse_recipe
from tests.docs.prepared import PREPARED
from tests.docs.served import SERVED

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("bash", "sh", "python")
FILES = ("yaml", "json", "toml")
_NOTE = re.compile(r"<!-- page test: (.*?) -->")
_NEEDED = {
    "data": {"root": "data"},
    "model": {"backbone": "transformers/segformer-b0"},
    "run": {"dir": "r", "steps": 1},
}
"""Keys without which there is no recipe."""
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Block:
    """A block of a page."""

    line: int
    """Where it begins, from 1."""
    language: str
    code: str
    """With all replacements."""
    prepare: tuple[str, ...] = ()
    serve: tuple[str, ...] = ()
    file: str | None = None
    keys: bool = False
    """Whether it is sections of a recipe."""
    not_run: str | None = None
    """The reason."""
    continues: bool = False
    """Whether it begins with the code of the block before."""


def read_blocks(text: str) -> list[Block]:
    """All blocks of a page that are commands or files.

    Raises:
        ValueError: a note is not understood, replaces nothing, or belongs to no block; names the line.
    """
    blocks: list[Block] = []
    notes: list[tuple[int, str]] = []
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        notes += [(number, note) for note in _NOTE.findall(line)]
        if not (opening := re.fullmatch(r"(\s*)```(\w*)", line)):
            continue
        indent, language = opening.groups()
        code = []
        for _, inner in lines:
            if inner.strip() == "```":
                break
            code.append(inner.removeprefix(indent))
        if language in COMMANDS + FILES:
            block = _block(number, language, "\n".join(code) + "\n", notes)
            if block.continues:
                before = blocks[-1] if blocks else block
                if before is block or before.not_run or {before.language, language} != {"python"}:
                    raise ValueError(f"line {number}: there is no Python before it that it continues")
                if block != Block(number, language, block.code, continues=True):
                    raise ValueError(f"line {number}: a block that continues another has no notes but replacements")
                blocks[-1] = replace(blocks[-1], code=blocks[-1].code + block.code)
            else:
                blocks.append(block)
            notes = []
    if notes:
        raise ValueError(f"line {notes[0][0]}: {notes[0][1]!r} belongs to no block")
    return blocks


def _block(line: int, language: str, code: str, notes: list[tuple[int, str]]) -> Block:
    names: dict[str, list[str]] = {"prepare": [], "serve": []}
    file, keys, not_run, continues = None, False, None, False
    for number, note in notes:
        if match := re.fullmatch(r"replace `(.+?)` with `(.*)`", note):
            if match[1] not in code:
                raise ValueError(f"line {number}: the block has no {match[1]!r}")
            code = code.replace(match[1], match[2])
        elif match := re.fullmatch(r"(prepare|serve) (\w+)", note):
            names[match[1]].append(match[2])
        elif match := re.fullmatch(r"file (\S+)", note):
            file = match[1]
        elif match := re.fullmatch(r"not run: (.+)", note):
            not_run = match[1]
        elif note == "keys of a recipe":
            keys = True
        elif note == "continues":
            continues = True
        else:
            raise ValueError(f"line {number}: {note!r} is no note that is known here")
    if keys and language != "yaml":
        raise ValueError(f"line {line}: a {language} block has no keys of a recipe")
    if language in FILES and file is None and not keys and not_run is None:
        raise ValueError(f"line {line}: a {language} block needs a note that names its file, or why it is none")
    return Block(line, language, code, tuple(names["prepare"]), tuple(names["serve"]), file, keys, not_run, continues)


def run_blocks(blocks: list[Block], folder: Path) -> None:
    """Run the blocks of a page one after the other in a folder; all see the files of those before.

    Raises:
        AssertionError: one has failed; with its line and what it has printed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "agg",
    }
    with ExitStack() as servers:
        for block in blocks:
            for name in block.prepare:
                PREPARED[name](folder)
            for name in block.serve:
                environment |= servers.enter_context(SERVED[name](folder))
            if block.not_run is None:
                _run(block, folder, environment)


def _run(block: Block, folder: Path, environment: dict[str, str]) -> None:
    if block.file is not None:
        (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
        (folder / block.file).write_text(block.code)
        return
    if block.keys:
        given = OmegaConf.merge(_NEEDED, OmegaConf.create(block.code))  # refuses a key that is there twice
        parse_recipe(OmegaConf.to_container(given), f"line {block.line}")
        return
    command = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
    done = subprocess.run(
        [*command, block.code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"line {block.line}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
