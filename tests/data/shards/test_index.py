"""Entries of an index of which not everything is known: no checksum, no size."""

import json

import pytest
from pydantic import ValidationError

from maskmatch_scale.data.order.source import WeightedSource
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.data.shards.index import ShardEntry, ShardIndex, ShardTable
from maskmatch_scale.data.shards.reading import ShardStream
from tests.conftest import ShapesSource, write_shards

BARE = {"file": "a.tar", "samples": 3}
WHOLE = {**BARE, "bytes": 7, "sha256": f"{5:064x}"}
TAGGED = {**BARE, "file": "https://me:secret@host/b.tar?sig=1", "etag": '"é-1"'}


def test_what_is_not_known_is_left_out():
    table = ShardTable([BARE, WHOLE, TAGGED])
    assert table.as_json() == [BARE, WHOLE, TAGGED]
    assert [entry.model_dump(exclude_none=True) for entry in table] == [BARE, WHOLE, TAGGED]
    assert ShardTable(table) == table
    assert [table.size(number) for number in range(3)] == [None, 7, None]
    assert [table.sha256(number) for number in range(3)] == [None, f"{5:064x}", None]
    assert [table.etag(number) for number in range(3)] == [None, None, '"é-1"']
    index = ShardIndex(source="x", streams={"unlabelled": {"labelled": False, "shards": table}})
    assert ShardIndex.parse(index.to_json(), "x").streams["unlabelled"].shards == table


@pytest.mark.parametrize(
    "change", [{"bytes": 0}, {"bytes": -1}, {"bytes": "7"}, {"samples": 2.5}, {"sha256": ""}, {"etag": ""}, {"etag": 3}]
)
def test_what_is_known_must_be_well_formed(change):
    with pytest.raises(ValueError, match=f"1.{next(iter(change))}"):
        ShardTable([WHOLE, {**WHOLE, **change}])
    with pytest.raises(ValidationError):
        ShardEntry.model_validate({**WHOLE, **change}, strict=True)


def test_the_identity_of_a_shard():
    def identity(**facts):
        return ShardTable([WHOLE, {**TAGGED, **facts}]).identities()[32:].tobytes()

    assert ShardTable([WHOLE, WHOLE]).identities().tobytes() == bytes.fromhex(WHOLE["sha256"]) * 2
    assert ShardTable([WHOLE, TAGGED]).identities()[:32].tobytes() == bytes.fromhex(WHOLE["sha256"])
    others = [identity(file="https://host/c.tar"), identity(bytes=8), identity(etag='"2"'), identity(sha256="f" * 64)]
    assert len({identity(), *others}) == 5
    assert identity(file="https://host/b.tar?sig=2") == identity()  # what is signed anew is the same file


def test_a_folder_with_checksums_has_the_order_that_it_always_had(tmp_path):
    """Pinned: a checkpoint of before continues only if the digest is the same."""
    write_shards(ShapesSource({"unlabelled": 4}), tmp_path, workers=1, progress=False)
    content = json.loads((tmp_path / "index.json").read_text())
    for number, shard in enumerate(content["streams"]["unlabelled"]["shards"]):
        shard["sha256"] = f"{number:064x}"
    (tmp_path / "index.json").write_text(json.dumps(content))
    source = WeightedSource(ShardStream(tmp_path, "unlabelled"), "unlabelled", 3, 4096)
    assert source.info.content == "51f1061f4dc4af63"
    for shard in content["streams"]["unlabelled"]["shards"]:
        del shard["sha256"]
    (tmp_path / "index.json").write_text(json.dumps(content))
    assert load_index(str(tmp_path)).streams["unlabelled"].shards.sha256(0) is None
    other = WeightedSource(ShardStream(tmp_path, "unlabelled"), "unlabelled", 3, 4096)
    assert other.info.content != source.info.content
    assert [other.order(0, 2)[place] for place in range(4)] == [source.order(0, 2)[place] for place in range(4)]
