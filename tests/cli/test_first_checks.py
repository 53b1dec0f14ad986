"""The commonest mistakes are answered before torch is imported, which takes seconds."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.conftest import recipe_maker

DRIVER = """
import contextlib, io, json, sys
from maskmatch_scale.cli.main import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            print(json.dumps([end.code, "torch" in sys.modules, err.getvalue()]))
"""


def driven(folder, *commands):
    """Of each `maskmatch …`, one after the other in a process of their own: exit code, whether torch was imported by
    then, and stderr.
    """
    call = [sys.executable, "-c", DRIVER, json.dumps(commands)]
    done = subprocess.run(call, capture_output=True, text=True, cwd=folder, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shapes):
    """A recipe of a real shard folder, the folders of VOC, and a run of which only the recipe is there."""
    root = tmp_path_factory.mktemp("mistakes")
    recipe = recipe_maker(shapes, root)()
    (root / "recipe.yaml").write_text(recipe.to_yaml())
    (root / "run").mkdir()
    shutil.copy(root / "recipe.yaml", root / "run" / "recipe.yaml")
    (root / "names.txt").write_text("ground\ncrack\n")
    (root / "JPEGImages").mkdir()
    (root / "SegmentationClass").mkdir()
    return root


MISTAKES = [
    (["train", "none.yaml"], "recipe none.yaml: no such file"),
    (["train", "recipe.yaml", "data.rot=x"], "unknown key data.rot"),
    (["train", "recipe.yaml", "data.root=none"], "data.root=none: no such folder; write shards first"),
    (["train", "recipe.yaml", "data.root=."], "data.root=.: not a shard folder; write one with `maskmatch shards"),
    (["train", "recipe.yaml", "data.unlabelled=[{root: none}]"], "data.unlabelled: root=none: no such folder"),
    (["train", "recipe.yaml", "--resume", "none"], "--resume none: no such run or checkpoint"),
    (["sweep", "none.yaml", "optim.lr=1,2", "--out", "sweep"], "recipe none.yaml: no such file"),
    (["sweep", "recipe.yaml", "optim.lr=1,2", "data.root=none", "--out", "sweep"], "data.root=none: no such folder"),
    (["train", "run"], "recipe run: a folder; name run/recipe.yaml"),
    (["train", "names.txt"], "recipe names.txt: not a mapping of sections"),
    (["train", "recipe.yaml", "data.unlabelled=x"], "a list of sources, such as 'data.unlabelled=[{root: FOLDER}]'"),
    (["evaluate", "names.txt"], "names.txt: not a run directory (no recipe.yaml); name a folder that run.dir named"),
    (["plan", "none.yaml"], "recipe none.yaml: no such file"),
    (["evaluate", "none"], "none: no such run or checkpoint"),
    (["evaluate", "run", "--split", "test"], "--split test: no such stream in"),
    (["predict", "none", "x.jpg", "--out", "out"], "none: no such run, checkpoint or export"),
    (["export", "none", "out"], "none: no such run, checkpoint or export"),
    (["shards", "write", "folder", "none", "out"], "none: no such folder"),
    (["shards", "verify", "none"], "error: none: no such folder"),
    (["shards", "show", "none"], "error: none: no such folder"),
    (["shards", "index", "none", "out"], "none: no such file"),
    (["train"], "train: missing argument 'RECIPE' (example: maskmatch train configs/"),
]


def test_no_torch_for_a_mistake(folder):
    before = sorted(folder.rglob("*"))
    found = driven(folder, *(words for words, _ in MISTAKES))
    for (words, said), (code, torch, err) in zip(MISTAKES, found, strict=True):
        assert (code, torch, err.count("\n")) == (2, False, 1), (words, err)
        assert said in err, words
    assert sorted(folder.rglob("*")) == before


def test_what_is_right_does_import_torch(folder):
    """The driver can tell: otherwise the test above would pass whatever is imported."""
    ((code, torch, err),) = driven(folder, ["evaluate", "run", "--weights", "ema"])
    assert (code, torch) == (2, True), err
