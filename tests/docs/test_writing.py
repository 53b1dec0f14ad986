"""The commands in docs/writing.md for several machines, merging and appending are run."""

from __future__ import annotations

from pathlib import Path

from maskmatch_scale.data.shards.index import ShardIndex
from tests.docs.pages import ROOT, read_blocks, run_blocks


def test_parts_are_written_merged_and_appended(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "writing.md").read_text(encoding="utf-8")
    blocks = read_blocks(page[page.index("## On several machines") :])
    assert len(blocks) == 3
    run_blocks(blocks[:2], tmp_path)
    both = ShardIndex.load(tmp_path / "data" / "both")
    assert {name: stream.samples for name, stream in both.streams.items()} == {
        "labelled": 9,
        "unlabelled": 5,
        "dev": 2,
    }
    run_blocks(blocks[2:], tmp_path)
    grown = ShardIndex.load(tmp_path / "data" / "photos")
    assert sum(stream.samples for stream in grown.streams.values()) == 15
