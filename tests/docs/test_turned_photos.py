"""The command for photos that are stored turned, in docs/writing.md."""

import json

from tests.docs.pages import ROOT, read_blocks, run_blocks


def test_its_command_runs(tmp_path):
    text = (ROOT / "docs" / "writing.md").read_text(encoding="utf-8")
    _, section = text.split("\n## Photos that are stored turned\n")
    blocks = read_blocks(section.split("\n## ")[0])
    assert blocks
    run_blocks(blocks, tmp_path)
    index = json.loads((tmp_path / "data" / "phone" / "index.json").read_text())
    assert sum(shard["samples"] for shard in index["streams"]["labelled"]["shards"]) == 4
