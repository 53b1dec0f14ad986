"""Every command on the pages that say how a task is done is run, with tiny data and few steps."""

from pathlib import Path

import pytest

from tests.docs.pages import ROOT, read_blocks, run_blocks

FAST = ("own_data",)
SLOW = ("binary_masks", "remote_sensing", "own_backbone", "sweep")
NOT_RUN: dict[str, tuple[str, ...]] = {}
"""Blocks that are not run, and the reasons that their pages give."""


def blocks_of(page: str):
    return read_blocks((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [*FAST, *(pytest.param(page, marks=pytest.mark.slow) for page in SLOW)])
def test_every_command_of_a_page_runs(page, tmp_path):
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


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- page test: replace `x` with `y` -->\n```bash\nls\n```", "line 1: the block has no 'x'"),
        ("<!-- page test: skip -->\n```bash\nls\n```", "line 1: 'skip' is no note"),
        ("```yaml\na: 1\n```", "line 1: a yaml block needs a note"),
        ("```bash\nls\n```\n<!-- page test: prepare photos -->", "line 4: 'prepare photos' belongs to no block"),
    ],
)
def test_a_note_that_does_nothing_is_an_error(page, message):
    with pytest.raises(ValueError, match=message):
        read_blocks(page)
