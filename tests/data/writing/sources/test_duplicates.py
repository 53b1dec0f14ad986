"""Equal files, against comparing all with all."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from maskmatch_scale.data.writing.sources.duplicates import find_duplicates

# Ends and sizes that agree while the contents do not, and the other way round.
starts = st.sampled_from([b"", b"a", b"b", b"a" * 5000, b"b" * 5000])
ends = st.sampled_from([b"", b"x", b"x" * 4096, b"y" * 4096])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(starts, ends), max_size=12))
def test_the_first_of_equal_files_is_found(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("files")
    for number, parts in enumerate(files):
        Path(root, f"{number}").write_bytes(b"".join(parts))
    datas = [b"".join(parts) for parts in files]
    expected = {number: datas.index(data) for number, data in enumerate(datas) if datas.index(data) != number}
    paths = [str(root / f"{number}") for number in range(len(files))]
    assert find_duplicates(paths, threads=2, progress=False) == expected


def test_files_that_are_not_there_equal_none(tmp_path):
    (tmp_path / "one").write_bytes(b"1")
    paths = [str(tmp_path / name) for name in ("one", "nowhere", "neither")]
    assert find_duplicates(paths, threads=1, progress=False) == {}


def test_many_files(tmp_path):
    for number in range(1000):
        (tmp_path / f"{number}").write_bytes(number.to_bytes(2, "big") if number < 990 else b"\0\5")
    paths = [str(tmp_path / f"{number}") for number in range(1000)]
    assert find_duplicates(paths, threads=3, progress=True) == dict.fromkeys(range(990, 1000), 5)
