"""What words stand for, and that ranks share it without talking."""

from __future__ import annotations

import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.errors import UserError
from maskmatch_scale.predict.inputs import ImageFile, Shard, deal, find_inputs
from maskmatch_scale.predict.naming import output_names
from maskmatch_scale.recipe import DataRecipe

DATA = DataRecipe(root="none")


def found(words, out):
    return [each.location for each in find_inputs(list(map(str, words)), out, DATA)]


def test_folders_are_searched_and_patterns_expanded_each_file_once(photos, tmp_path):
    (photos / "notes.md").write_text("no image")
    (photos / ".hidden.png").write_bytes(b"")
    everything = [str(photos / name) for name in ("a.png", "b.jpg", "sub/a.png", "sub/c.webp")]
    assert found([photos], tmp_path / "out") == everything
    assert found([photos / "*.jpg", photos / "{a,b}.*", photos], tmp_path / "out")[:2] == [
        str(photos / "b.jpg"),
        str(photos / "a.png"),
    ]
    assert sorted(found([photos / "*.jpg", photos / "{a,b}.*", photos], tmp_path / "out")) == everything


def test_nothing_in_the_folder_of_predictions_is_an_input(photos):
    (photos / "out" / "ids").mkdir(parents=True)
    shutil.copy(photos / "a.png", photos / "out" / "ids")
    assert len(found([photos], photos / "out")) == 4
    with pytest.raises(UserError, match="an input itself"):
        found([photos], photos)


def test_patterns_leave_out_the_folder_of_predictions_as_well(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    (photos / "out" / "ids").mkdir(parents=True)
    shutil.copy(photos / "a.png", photos / "out" / "ids")
    inputs = [str(photos / name) for name in ("a.png", "b.jpg", "sub/a.png", "sub/c.webp")]
    for pattern in ("photos/*", "photos/**", "photos/{out,a.png,b.jpg,sub}", "*"):
        assert sorted(found([pattern], photos / "out")) == inputs
    with pytest.raises(UserError, match="an input itself"):
        found(["photos/out"], photos / "out")


def test_parts_of_paths_behind_links_are_where_the_link_leads(photos, tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "link").symlink_to(photos / "sub")
    assert found([tmp_path / "deep" / "er" / "link" / ".." / "a.png"], tmp_path / "out") == [str(photos / "a.png")]
    # Other links stay, since names of predictions come from them.
    link = tmp_path / "deep" / "er" / "link" / "a.png"
    assert found([link], tmp_path / "out") == [str(link)]


def test_a_link_to_itself_is_no_reason_to_end(photos, tmp_path):
    (photos / "loop.jpg").symlink_to("loop.jpg")
    assert found([photos / "*.jpg"], tmp_path / "out") == [str(photos / "b.jpg"), str(photos / "loop.jpg")]


@pytest.mark.parametrize("name", ["a{1,2}.jpg", "x{.jpg", "b\\c.jpg", "d[1].jpg"])
def test_a_file_that_exists_is_no_pattern(photos, tmp_path, name):
    shutil.copy(photos / "b.jpg", photos / name)
    assert found([photos / name], tmp_path / "out") == [str(photos / name)]


def test_labels_of_other_programs_beside_images_are_no_lists(photos, tmp_path):
    (photos / "a.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (photos / "a.json").write_text("{}")
    assert found([photos / "a*"], tmp_path / "out") == [str(photos / "a.png")]
    (photos / "list.txt").write_text("b.jpg\n")
    assert found([photos / "l*.txt"], tmp_path / "out") == [str(photos / "b.jpg")]


def test_a_list_may_begin_with_a_byte_order_mark_and_name_what_is_no_address(photos, tmp_path):
    (photos / "list.txt").write_text("a.png\nhttps://[x/a.jpg\n", encoding="utf-8-sig")
    locations = found([photos / "list.txt"], tmp_path / "out")
    assert locations == [str(photos / "a.png"), "https://[x/a.jpg"]
    assert output_names(locations) == ["a.png", "a.jpg"]


def test_a_list_names_paths_beside_it_and_addresses(photos, tmp_path):
    (photos / "list.txt").write_text("# ours\nsub/a.png\n\nhttps://host/b.jpg?sig=1\n/x/y.tar\n")
    one, two, three = find_inputs([str(photos / "list.txt")], tmp_path / "out", DATA)
    assert one == ImageFile(str(photos / "sub" / "a.png"))
    assert two == ImageFile("https://host/b.jpg?sig=1")
    assert three == Shard("/x/y.tar")


def test_a_shard_folder_stands_for_its_shards_with_what_its_index_says(shapes, tmp_path):
    inputs = find_inputs([str(shapes)], tmp_path / "out", DATA)
    assert sum(each.samples for each in inputs if isinstance(each, Shard)) == 8 + 24 + 5 + 5
    assert all(isinstance(each, Shard) and each.sha256 and each.bytes for each in inputs)
    assert find_inputs([str(shapes / "index.json")], tmp_path / "out", DATA) == inputs


@pytest.mark.parametrize(
    ("word", "said"),
    [("nowhere", "no such file"), ("empty", "no image"), ("https://host/*.jpg", "web servers do not list")],
)
def test_words_that_stand_for_nothing_are_refused(tmp_path, monkeypatch, word, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises((UserError, DataError), match=said):
        find_inputs([word], tmp_path / "out", DATA)


FILES = st.integers(0, 30).map(lambda n: ImageFile(f"/p/{n}.jpg"))
SHARDS = st.builds(Shard, st.integers(0, 30).map(lambda n: f"/s/{n}.tar"), st.integers(0, 20))
REMOTE = st.builds(Shard, st.integers(0, 30).map(lambda n: f"https://host/{n}.tar"), st.integers(0, 20))


@given(st.lists(FILES | SHARDS | REMOTE, unique_by=lambda each: each.location), st.integers(1, 5))
def test_ranks_have_each_image_once_together(inputs, world_size):
    done = [
        (share.input.location, place)
        for rank in range(world_size)
        for share in deal(inputs, rank, world_size)
        for place in range(share.first, getattr(share.input, "samples", 1), share.step)
    ]
    assert sorted(done) == sorted(
        (each.location, place) for each in inputs for place in range(getattr(each, "samples", 1))
    )
