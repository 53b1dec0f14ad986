"""Every command on the pages that say how a task is done is run, with tiny data and few steps."""

from pathlib import Path

import pytest
from yaml import YAMLError

from maskmatch_scale.errors import UserError
from tests.docs.pages import ROOT, read_blocks, run_blocks

FAST = ("own_data",)
SLOW = (
    "webdataset", "binary_masks", "remote_sensing", "own_backbone", "sweep",
    "predict", "fine_tuning", "from_the_hub", "trackers", "evaluation", "export",
)  # fmt: skip
NEEDS = {
    "remote_sensing": ("rasterio",),
    "predict": ("rasterio",),
    "trackers": ("tensorboard",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
}
"""Libraries of extras."""
NOT_RUN = {
    "predict": ("it installs packages; tests/predict/test_run.py predicts without DeepSpeed",),
    "webdataset": ("wids is not in webdataset 1",),
    "from_the_hub": ("a download; a tiny model stands in its place",),
}
"""Blocks that are not run, and the reasons that their pages give."""


def blocks_of(page: str):
    return read_blocks((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [*FAST, *(pytest.param(page, marks=pytest.mark.slow) for page in SLOW)])
def test_every_command_of_a_page_runs(page, tmp_path):
    for library in NEEDS.get(page, ()):
        pytest.importorskip(library)
    blocks = blocks_of(page)
    assert blocks
    run_blocks(blocks, tmp_path)


@pytest.mark.parametrize("page", FAST + SLOW)
def test_what_is_not_run_is_known(page):
    assert tuple(block.not_run for block in blocks_of(page) if block.not_run) == NOT_RUN.get(page, ())


@pytest.mark.parametrize("page", FAST + SLOW)
def test_the_readme_links_it(page):
    assert f"(docs/{page}.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


PAGE = """
<!-- page test: replace `one` with `two` -->
```bash
echo one one > said
```

```
not a command
```
1. in a list

   <!-- page test: file a/b.yaml -->
   ```yaml
   key: value
     more: 1
   ```
<!-- page test: not run: no reason -->
```python
raise SystemExit(1)
```
```python
assert open("a/b.yaml").read() == "key: value\\n  more: 1\\n"
```
"""


def test_blocks_run_in_order_with_their_replacements(tmp_path: Path):
    blocks = read_blocks(PAGE)
    assert [(block.line, block.language) for block in blocks] == [
        (3, "bash"),
        (13, "yaml"),
        (18, "python"),
        (21, "python"),
    ]
    run_blocks(blocks, tmp_path)
    assert (tmp_path / "said").read_text() == "two two\n"
    with pytest.raises(AssertionError, match="line 1: exit code 3"):
        run_blocks(read_blocks("```bash\nfalse || exit 3\n```"), tmp_path)
    with pytest.raises(AssertionError, match="line 1: exit code 1"):
        run_blocks(read_blocks("```bash\nfalse\ntrue\n```"), tmp_path)


CONTINUED = """
```python
number = 1
```
<!-- page test: replace `== 2` with `== 1` -->
<!-- page test: continues -->
```python
assert number == 2
```
"""


def test_python_continues(tmp_path: Path):
    blocks = read_blocks(CONTINUED)
    assert [block.line for block in blocks] == [2]
    run_blocks(blocks, tmp_path)
    with pytest.raises(AssertionError, match=r"line 2: exit code 1(.|\n)*AssertionError"):
        run_blocks(read_blocks(CONTINUED.replace("number = 1", "number = 3")), tmp_path)


KEYS = """
<!-- page test: keys of a recipe -->
```yaml
model: {head: linear}
method: {threshold: {default: 0.9, pole: 0.8}}
```
"""


def test_keys_of_a_recipe_are_read(tmp_path: Path):
    run_blocks(read_blocks(KEYS), tmp_path)
    with pytest.raises(UserError, match=r"line 3: unknown key method\.treshold"):
        run_blocks(read_blocks(KEYS.replace("threshold", "treshold")), tmp_path)
    with pytest.raises(YAMLError, match="duplicate key model"):
        run_blocks(read_blocks(KEYS.replace("method:", "model: {head: dpt}\nmethod:")), tmp_path)


SERVED = """
<!-- page test: serve web -->
```bash
echo hello > there
```
<!-- page test: replace `https://example.org` with `$WEB` -->
```python
import os
from urllib.request import urlopen

assert urlopen(os.path.expandvars("https://example.org/there")).read() == b"hello\\n"
```
"""


def test_servers_are_there_to_the_end_of_the_page(tmp_path: Path):
    run_blocks(read_blocks(SERVED), tmp_path)


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- page test: replace `x` with `y` -->\n```bash\nls\n```", "line 1: the block has no 'x'"),
        ("<!-- page test: skip -->\n```bash\nls\n```", "line 1: 'skip' is no note"),
        ("```yaml\na: 1\n```", "line 1: a yaml block needs a note"),
        ("<!-- page test: keys of a recipe -->\n```bash\nls\n```", "line 2: a bash block has no keys"),
        ("<!-- page test: continues -->\n```python\n1\n```", "line 2: there is no Python before it"),
        ("```bash\nls\n```\n<!-- page test: continues -->\n```python\n1\n```", "line 5: there is no Python before"),
        (CONTINUED.replace("replace `== 2` with `== 1`", "prepare photos"), "line 7: a block that continues another"),
        ("```bash\nls\n```\n<!-- page test: prepare photos -->", "line 4: 'prepare photos' belongs to no block"),
    ],
)
def test_a_note_that_does_nothing_is_an_error(page, message):
    with pytest.raises(ValueError, match=message):
        read_blocks(page)
