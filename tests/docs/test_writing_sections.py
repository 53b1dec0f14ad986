"""Commands of those sections of docs/writing.md that are run, with tiny data."""

import pytest

from tests.docs.pages import ROOT, read_blocks, run_blocks


def section(title):
    text = (ROOT / "docs" / "writing.md").read_text(encoding="utf-8")
    _, found = text.split(f"\n## {title}\n")
    return read_blocks(found.split("\n## ")[0])


@pytest.mark.parametrize("title", ["Bands and 16 bits"])
def test_every_command_of_a_section_runs(title, tmp_path):
    pytest.importorskip("rasterio")
    blocks = section(title)
    assert blocks
    run_blocks(blocks, tmp_path)
