"""Names of predictions: all different, within their folder, and those of the images where that is possible."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskmatch_scale.predict.naming import output_names, safe, safe_path

PARTS = st.sampled_from(["a", "b", "a.jpg", "a.png", "a-2", "b.tar", "c.d.jpg", "..", "x\n", "ä" * 120, "https:"])


@given(st.lists(st.lists(PARTS, min_size=1, max_size=4), min_size=1, max_size=8, unique_by=tuple), st.booleans())
def test_names_are_different_and_stay_below_their_folder(paths, remote):
    locations = ["/" + "/".join(parts) for parts in paths]
    if remote:
        locations[0] = f"https://host{locations[0]}?token=1"
    names = output_names(locations)
    assert len(set(names)) == len(names) == len(locations)
    for name in names:
        path = PurePosixPath(name)
        assert not path.is_absolute()
        assert ".." not in path.parts
        assert name.isprintable()
        assert all(len(part.encode()) <= 220 for part in path.parts)


@pytest.mark.parametrize(
    ("locations", "names"),
    [
        (["/data/photos/a.jpg"], ["a"]),
        (["/data/p/a.jpg", "/data/p/sub/a.jpg"], ["a", "sub/a"]),
        (["/data/p/a.jpg", "/data/q/a.jpg"], ["p/a", "q/a"]),
        (["/p/a.jpg", "/p/a.png", "/p/b.png"], ["a.jpg", "a.png", "b"]),
        (["/p/x.tar", "/p/x/a.png"], ["x.tar", "x/a"]),
        (["https://host/d/a%20b.jpg?sig=secret", "https://host/e/c.jpg"], ["d/a b", "e/c"]),
        (["/p/a.jpg", "https://host/a.jpg"], ["a.jpg", "a.jpg-2"]),
    ],
)
def test_names_are_paths_below_the_folder_that_all_have_in_common(locations, names):
    assert output_names(locations) == names


def test_what_is_no_name_of_a_file_is_replaced_and_stays_different():
    assert safe("photo 1.jpg") == "photo 1.jpg"
    changed = {safe(name) for name in ("a\n", "a\t", "a/", "", ".", "..")}
    assert len(changed) == 6
    assert safe_path("a/../b").split("/")[1] != ".."
