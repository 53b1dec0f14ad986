"""Commands of docs/writing.md are run, with tiny data: here most of its sections."""

import re

import pytest

from tests.docs.pages import ROOT, read_blocks, run_blocks


def section(title):
    text = (ROOT / "docs" / "writing.md").read_text(encoding="utf-8")
    _, found = text.split(f"\n## {title}\n")
    return read_blocks(found.split("\n## ")[0])


NEEDS = {
    "Huge images": "rasterio",
    "Bands and 16 bits": "rasterio",
    "COCO JSON": "pycocotools",
    "labelme": "pycocotools",
}
"""Libraries of extras."""
TITLES = (
    *("A folder of images", "A list", "Pascal VOC", "Cityscapes", "ADE20K", "COCO-Stuff", "UniMatch's splits"),
    *("Classes, colours, id maps", "Classes merged or ignored when reading", *NEEDS),
)
RUN_ELSEWHERE = ("On several machines", "Merging", "Appending", "Photos that are stored turned")
"""Titles of the sections of test_writing.py and test_turned_photos.py."""


def test_no_section_with_commands_is_left_out():
    text = (ROOT / "docs" / "writing.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert {title for title in titles if section(title)} == {*TITLES, *RUN_ELSEWHERE}


@pytest.mark.parametrize("title", TITLES)
def test_every_command_of_a_section_runs(title, tmp_path):
    if title in NEEDS:
        pytest.importorskip(NEEDS[title])
    blocks = section(title)
    assert blocks
    run_blocks(blocks, tmp_path)
