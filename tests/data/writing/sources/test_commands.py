"""The commands as they are documented, and as other files use them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from maskmatch_scale.cli import shard_sources, shards_merge  # noqa: F401
from maskmatch_scale.cli.shards_write import shards_app, write_app

DOCS = (Path(__file__).parents[4] / "docs" / "writing.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"^maskmatch shards write .*", DOCS.replace("\\\n", ""), re.MULTILINE)))
SOURCES = ("scores", "folder", "list", "voc", "cityscapes", "ade20k", "coco-stuff", "coco", "labelme")


@pytest.mark.parametrize("line", [pytest.param(line, id=str(number)) for number, line in enumerate(COMMANDS)])
def test_commands_of_the_documentation_exist(line):
    source, *arguments = shlex.split(line)[3:]
    command = get_command(write_app).commands[source]
    context = command.make_context(source, arguments)  # parses, runs nothing
    assert context.args == []
    assert {p.name for p in command.params if p.required} <= context.params.keys()


def test_options_of_the_documentation_exist():
    commands = [*get_command(write_app).commands.values(), get_command(shards_app).commands["merge"]]
    known = {option for command in commands for p in command.params for option in p.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", DOCS)) - {"--help"} <= known | {"--split"}


@pytest.mark.parametrize("source", SOURCES)
def test_help_has_an_example(run, source, capsys, monkeypatch):
    from maskmatch_scale.cli import main as cli

    monkeypatch.setattr("sys.argv", ["maskmatch", "shards", "write", source, "--help"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out = capsys.readouterr().out
    assert (end.value.code, f"Example: maskmatch shards write {source}" in " ".join(out.split())) == (0, True)


def test_every_source_is_documented():
    assert set(SOURCES) == set(get_command(write_app).commands)
    assert all(f"`{source}`" in DOCS for source in SOURCES)


def test_an_unknown_source_is_one_line(run):
    code, err = run("photographs", "out")
    assert (code, err.count("\n"), all(source in err for source in SOURCES)) == (2, 1, True)


def test_tables_come_with_the_package():
    from maskmatch_scale.data.writing.sources.classes import BUILT_IN, IGNORE, built_in_classes, colour_map

    counts = {"voc": 21, "cityscapes": 19, "ade20k": 150, "coco_stuff": 171, "coco": 81}
    assert {name: len(built_in_classes(name).names) for name in BUILT_IN} == counts
    for name in BUILT_IN:
        classes = built_in_classes(name)
        assert len(set(classes.names)) == len(classes.palette) == counts[name]
        assert all(name == name.strip() for name in classes.names)
        assert set(classes.id_map.values()) == {*range(counts[name]), IGNORE}
    # VOC's palette is its formula; two sources of one table agree.
    assert built_in_classes("voc").palette == colour_map(21)
    assert built_in_classes("coco").names[1:] == built_in_classes("coco_stuff").names[:80]
