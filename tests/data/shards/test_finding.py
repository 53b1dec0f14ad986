"""Indexes that other tools wrote: found, read without opening a shard, and refused where they are wrong."""

import json
from pathlib import Path

import pytest

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.shards.folder import load_index
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.data.shards.tar import read_table
from maskmatch_scale.recipe import DataRecipe
from tests.data import foreign_shards
from tests.data.faulty_server import Fault, FaultyServer
from tests.data.foreign_shards import COUNTS, LAYOUTS

FILLED = [count for count in COUNTS if count]
KEYS = [f"{number:09d}" for number in range(sum(COUNTS))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_sample_by_its_number_from_an_index_of_others(tmp_path, layout):
    root = LAYOUTS[layout](tmp_path)
    stream = ShardStream(root, "unlabelled")
    assert stream.shards.samples.tolist() == FILLED
    assert [stream[number].key for number in range(len(stream))] == KEYS
    for number in range(len(stream.shards)):
        assert stream.shards.size(number) == Path(stream.location(number)).stat().st_size
        assert stream.shards.sha256(number) is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_shard_is_opened(tmp_path, layout):
    root = LAYOUTS[layout](tmp_path)
    for path in tmp_path.rglob("*.tar"):
        path.write_bytes(b"no tar at all")
    assert load_index(root).streams["unlabelled"].samples == sum(COUNTS)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout not in ("img2dataset", "text_beside_notes")])
def test_an_index_with_a_known_name_is_read_from_a_server(tmp_path, layout):
    root = LAYOUTS[layout](tmp_path / "served")
    with FaultyServer(tmp_path / "served") as server:
        address = f"{server.url}{root.removeprefix(str(tmp_path / 'served'))}"
        stream = ShardStream(address, "unlabelled", DataRecipe(root=address, cache_dir=str(tmp_path / "cache")))
        assert not [request for request in server.requests if request.path.endswith(".tar")]
        assert [stream[number].key for number in range(len(stream))] == KEYS


def test_a_folder_of_img2datasets_elsewhere_cannot_be_listed(tmp_path):
    foreign_shards.img2dataset(tmp_path)
    with FaultyServer(tmp_path) as server:
        with pytest.raises(
            DataError, match=r"looked for index\.json, \.nv-meta/\.info\.json.*404.*wids list.*shards index '"
        ):
            load_index(server.url)
        server.set_faults({"*": Fault(status=503)})
        with pytest.raises(DataError, match="503"):  # perhaps there is one: it is not said that there is none
            load_index(server.url, DataRecipe(root=server.url, fetch_attempts=1))


def test_parts_of_energon(tmp_path):
    root = foreign_shards.energon(tmp_path, (3, 5, 2, 4))
    split = (
        "split_parts: {train: ['shards/{00000..00001}.tar'], val: [shards/00003.tar]}\nexclude: [shards/00000.tar]\n"
    )
    (tmp_path / ".nv-meta/split.yaml").write_text(split)
    streams = load_index(root).streams
    assert {name: [shard.file for shard in stream.shards] for name, stream in streams.items()} == {
        "unlabelled": ["shards/00001.tar"],
        "val": ["shards/00003.tar"],
    }


def test_parts_of_a_wids_list(tmp_path):
    parts = {"shardlist": [], "datasets": [{"shardlist": [{"url": f"{n}.tar", "nsamples": n}]} for n in (1, 2)]}
    root = foreign_shards.wids(tmp_path, (), **parts)
    assert [shard.samples for shard in load_index(root).streams["unlabelled"].shards] == [1, 2]


@pytest.mark.parametrize("by", ["", "/.nv-meta/.info.json"])
@pytest.mark.parametrize(
    "split", ["train: ['shards/{00000..00001}.tar'], val: [shards/00002.tar]", "val: [shards/00002.tar]"]
)
def test_what_energon_holds_out_is_not_trained_on(tmp_path, by, split):
    """However its data set is named, and also if no part is called `train`."""
    root = foreign_shards.energon(tmp_path, (3, 5, 2))
    (tmp_path / ".nv-meta/split.yaml").write_text(f"split_parts: {{{split}}}\n")
    streams = load_index(root + by).streams
    assert {name: stream.shards.samples.tolist() for name, stream in streams.items()} == {
        "unlabelled": [3, 5],
        "val": [2],
    }


def break_wids(change):
    def break_it(folder):
        root = Path(foreign_shards.wids(folder))
        content = json.loads(root.read_text())
        change(content)
        root.write_text(json.dumps(content))
        return str(root)

    return break_it


def break_file(layout, name, content):
    def break_it(folder):
        root = layout(folder)
        path = folder / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        return root

    return break_it


I2D, ENERGON = foreign_shards.img2dataset, foreign_shards.energon


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (break_file(I2D, "00001_stats.json", None), r"00001\.tar: no 00001_stats\.json beside it"),
        (break_file(I2D, "00001.tar", None), r"00001_stats\.json: there is no 00001\.tar"),
        (break_file(I2D, "00001_stats.json", b"{"), r"00001_stats\.json: not JSON"),
        (break_file(I2D, "00001_stats.json", b"{}"), r"00001_stats\.json: no key `successes`"),
        (break_file(I2D, "00001_stats.json", b'{"successes": "5"}'), r"successes: '5' is not a number"),
        (break_file(I2D, "00001_stats.json", b'{"successes": -5}'), "successes: -5 is not a number"),
        (
            lambda folder: str(foreign_shards.write_tar(folder / "a.tar", 1).parent),
            r"index\.json: no index; looked for",
        ),
        (break_wids(lambda content: content["shardlist"][1].pop("nsamples")), r"shardlist\.1: it needs `url`"),
        (break_wids(lambda content: content["shardlist"][1].update(url=None)), r"shardlist\.1: it needs `url`"),
        (break_wids(lambda content: content["shardlist"][1].update(nsamples=-1)), r"shards\.json: shard 1\.samples"),
        (break_wids(lambda content: content["shardlist"][1].update(nsamples=1.5)), r"shards\.json: shard 1\.samples"),
        (break_wids(lambda content: content["shardlist"][1].update(filesize="x")), r"shards\.json: shard 1\.bytes"),
        (break_wids(lambda content: content.update(datasets=[{"source_url": "x.json"}])), "another list"),
        (break_wids(lambda content: content.update(shardlist=5)), r"shards\.json: shardlist: not a list but int"),
        (break_wids(lambda content: content.update(datasets=5)), r"shards\.json: datasets: not a list but int"),
        (
            break_wids(lambda content: content.update(datasets=[{"shardlist": 5}])),
            r"datasets\.0\.shardlist: not a list",
        ),
        (break_file(foreign_shards.wids, "shards.json", b"["), r"shards\.json: not JSON"),
        (break_file(foreign_shards.wids, "shards.json", b"3"), r"shards\.json: the file"),
        (break_file(foreign_shards.wids, "shards.json", None), r"shards\.json: no such file"),
        (break_file(ENERGON, ".nv-meta/.info.json", b"{}"), "no `shard_counts`"),
        (break_file(ENERGON, ".nv-meta/split.yaml", b"exclude: [shards/00000.tar/x]"), "single samples"),
        (
            break_file(ENERGON, ".nv-meta/split.yaml", b"split_parts: {train: [a.tar]}"),
            r"names 'a\.tar', whose samples",
        ),
        (break_file(ENERGON, ".nv-meta/split.yaml", b"exclude: 5"), r"split\.yaml: exclude: not a list but int"),
        (break_file(ENERGON, ".nv-meta/split.yaml", b"split_parts: [a]"), r"split\.yaml: split_parts: not a list of"),
        (break_file(ENERGON, ".nv-meta/split.yaml", b"split_parts: {train: 5}"), r"split_parts\.train: not a list"),
        (
            break_file(ENERGON, ".nv-meta/split.yaml", b"split_parts: {train: ['{a']}"),
            r"split_parts\.train: Unbalanced",
        ),
        (break_file(ENERGON, ".nv-meta/split.yaml", b"a: ["), r"split\.yaml: not YAML"),
        (break_file(foreign_shards.open_clip, "sizes.json", b'{"0.tar": "many"}'), r"sizes\.json: shard 0\.samples"),
        (break_file(foreign_shards.text, "shards.txt", b"00000.tar 3\n00001.tar"), r"how many samples 00001\.tar has"),
        (break_file(foreign_shards.text, "shards.txt", b"\xff"), "not a text"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, layout, message):
    with pytest.raises(DataError, match=message) as caught:
        load_index(layout(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_index_of_ours_comes_first(shapes, tmp_path):
    root = foreign_shards.img2dataset(tmp_path)
    before = load_index(root)
    (tmp_path / "index.json").write_bytes((shapes / "index.json").read_bytes())
    assert before.source == "img2dataset"
    assert load_index(root).source == "shapes"


def test_the_tars_are_as_their_notes_say(tmp_path):
    """The layouts here are real: what the notes say is in the tars."""
    for path, count in zip(foreign_shards.write_tars(tmp_path), COUNTS, strict=True):
        with path.open("rb") as file:
            assert len(read_table(file, path.name, labelled=False)) == count
