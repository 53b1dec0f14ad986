"""Keys of samples from the paths of their images."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from maskmatch_scale.data.writing.sources.keys import keys_of

names_of_files = st.text(st.sampled_from("ab._/- "), min_size=1, max_size=6)


@given(st.lists(names_of_files.map(lambda name: f"{name}.jpg"), unique=True, max_size=30), st.randoms())
def test_keys_are_unique_and_do_not_depend_on_the_order(paths, random):
    keys = keys_of(paths)
    assert len(set(keys)) == len(paths)
    assert all(key and not set("./") & set(key) and not key.startswith("__") for key in keys)
    shuffled = list(paths)
    random.shuffle(shuffled)
    assert dict(zip(paths, keys)) == dict(zip(shuffled, keys_of(shuffled)))
