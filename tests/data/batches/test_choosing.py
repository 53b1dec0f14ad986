"""Parts, ranges, conditions and second labels of the sources of a run: which samples, in which order, continued how."""

import json
from collections import Counter
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from maskmatch_scale.data.batches.choosing import drawn_samples, drawn_shards
from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.recipe import RecipeError
from tests.data import bad_shards, foreign_shards
from tests.data.batches.archive import make, sequential, state_of_all, taken, write_archive
from tests.data.batches.common import make_batches, same
from tests.data.shards.test_second_labels import key, write_labels

COUNTS = (3, 5, 4, 6)
SHARDS = np.repeat(np.arange(4), COUNTS)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """img2dataset's, of four shards; sample n is 100 n px wide."""
    folder, first = tmp_path_factory.mktemp("widths") / "a", 0
    foreign_shards.img2dataset(folder, COUNTS)
    for shard, count in enumerate(COUNTS):
        members = [
            member
            for number in range(first, first + count)
            for member in [
                (f"{key(number)}.jpg", bad_shards.jpeg(number)),
                (f"{key(number)}.json", json.dumps({"width": 100 * number}).encode()),
            ]
        ]
        (folder / f"{shard:05d}.tar").write_bytes(bad_shards.tar_bytes(members))
        first += count
    return folder


@pytest.fixture
def make_source(make_recipe, archive, tmp_path):
    """The batches of a run whose unlabelled images are those that the archive has, chosen by these keys."""

    def made(source=None, **data):
        sources = [source] if source is not None and "root" in source else [{"root": str(archive), **(source or {})}]
        data = {"unlabelled": sources, "cache_dir": str(tmp_path / "cache"), "shuffle_window": 5} | data
        return make_batches(make_recipe, data=data, method={"burn_in": 0})

    return made


def numbers_of(side, epochs=1):
    """The numbers in the archive of the samples of the first epochs of a source alone, by the keys of its images."""
    (source,) = side.indexed
    found = Counter()
    for epoch in range(epochs):
        order = source.order(epoch, 1)
        for place in range(len(order)):
            shard, within = source._in_shard(*order[place])
            found[int(source.stream.read(shard, within).key)] += 1
    assert set(found.values()) <= {epochs}
    return sorted(found)


@pytest.mark.parametrize(
    ("source", "chosen"),
    [
        ({"shards": "1-2"}, range(3, 12)),
        ({"shards": "3,0"}, [*range(3), *range(12, 18)]),
        ({"shards": 2}, range(8, 12)),
        ({"shards": "0-1,1-2"}, range(12)),
        ({"where": "width >= 400 and width < 900"}, range(4, 9)),
        ({"where": "width >= 400", "shards": "0-1"}, range(4, 8)),
        ({"shards": "0-3"}, range(18)),
        ({"where": "width >= 0"}, range(18)),
        ({"part": 1.0}, range(18)),
    ],
)
def test_what_is_chosen(make_source, source, chosen):
    made = make_source(source)
    assert numbers_of(made.unlabelled, 2) == list(chosen)
    assert made.unlabelled_samples == len(chosen)
    if len(chosen) == 18:  # all of them: as if nothing was chosen
        assert made.unlabelled.leg.sources == make_source().unlabelled.leg.sources
    else:
        assert made.unlabelled.leg.sources != make_source().unlabelled.leg.sources
        assert made.notes[0].startswith(f"unlabelled source 'unlabelled': {len(chosen)} of 18 samples (")


def test_a_part_is_drawn_by_split_seed_and_name_from_what_is_left(make_source, archive):
    third = numbers_of(make_source({"part": 0.3}).unlabelled)
    assert len(third) == 6
    half = numbers_of(make_source({"part": 0.5}).unlabelled)
    assert len(half) == 9
    assert set(third) < set(half)
    assert numbers_of(make_source({"part": 0.3, "name": "other"}).unlabelled) != third
    assert numbers_of(make_source({"part": 0.3}, split_seed=1).unlabelled) != third
    wide = make_source({"part": 0.5, "where": "width >= 1000"})
    assert len(numbers_of(wide.unlabelled)) == 4
    assert min(numbers_of(wide.unlabelled)) >= 10
    assert wide.notes == ["unlabelled source 'unlabelled': 4 of 18 samples (where width >= 1000, part 0.5)"]


SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=90).filter(sum)


@given(SIZES, st.integers(0, 5), st.sampled_from([0.001, 0.1, 0.25, 0.5, 0.999, 1.0]), st.floats(0.001, 1))
def test_whole_shards_of_a_part(sizes, seed, part, larger):
    small, total = drawn_shards(part, sizes, seed), sum(sizes)
    counts = np.array(sizes)
    assert counts[small].sum() >= round(part * 1000) * total / 1000  # at least what was asked for
    assert counts[small].sum() < part * total + max(sizes)  # and less than a shard more
    assert (counts[small] > 0).all()
    assert (np.diff(small) > 0).all()
    if larger >= part:
        assert set(small) <= set(drawn_shards(larger, sizes, seed))


@given(st.integers(1, 500), st.integers(0, 5), st.sampled_from([0.001, 0.1, 0.3, 1.0]), st.floats(0.001, 1))
def test_samples_of_a_part(count, seed, part, larger):
    small = drawn_samples(part, count, seed)
    assert len(small) == -(-count * round(part * 1000) // 1000)
    assert (np.diff(small) > 0).all()
    if larger >= part:
        assert set(small) <= set(drawn_samples(larger, count, seed))


def test_of_many_shards_whole_ones_are_read(make_source, tmp_path):
    foreign_shards.img2dataset(tmp_path / "many", (2,) * 80)
    for source in ({}, {"where": "width == 128"}):
        made = make_source({"root": str(tmp_path / "many"), "part": 0.1, **source})
        numbers = numbers_of(made.unlabelled)
        assert len(numbers) == 16
        assert len({number // 2 for number in numbers}) == 8
        if not source:
            assert len(made.unlabelled.indexed[0].sizes) == 8  # the index of the others takes no memory
    few = numbers_of(make_source({"root": str(tmp_path / "many"), "part": 0.1, "shards": "0-59"}).unlabelled)
    assert len(few) == 12
    assert len({number // 2 for number in few}) > 6


def test_shards_out_of_range_need_not_be_there(make_source, archive, tmp_path):
    lines = [f"{archive}/0000{shard}.tar {count} 1000" for shard, count in enumerate(COUNTS)]
    lines[1] = f"{archive}/00001.tar {COUNTS[1]}"
    (tmp_path / "list.txt").write_text("\n".join([*lines, "gone.tar 7"]))
    made = make_source({"root": str(tmp_path / "list.txt"), "shards": 1}, bad_unlabelled="fail")
    assert numbers_of(made.unlabelled) == list(range(3, 8))


def test_stopped_and_continued_beside_a_source_in_sequence(make_recipe, archive, tmp_path):
    folder = write_archive(tmp_path / "sequential")
    mixed = [{"root": str(archive), "where": "width >= 400", "part": 0.5, "weight": 2}, sequential(folder)]
    how = {"source": mixed, "micro_batch": 3, "sequential_lanes": 2, "cache_dir": str(tmp_path / "cache")}
    plain = taken(make(make_recipe, folder, **how), 0, 24)
    first = make(make_recipe, folder, workers=2, **how)
    with closing(load_batches(first, 0, 24)) as loaded:
        assert all(same(one, other) for one, other in zip(islice(loaded, 11), plain, strict=False))
    again = make(make_recipe, folder, workers=1, **how)
    again.resume(json.loads(json.dumps(state_of_all([first], 11))))
    with closing(load_batches(again, 11, 24)) as loaded:
        assert all(same(one, other) for one, other in zip(loaded, plain[11:], strict=True))


@pytest.mark.parametrize("other", [{"part": 0.4}, {"shards": "0-2"}, {"where": "width > 500"}, {}])
def test_another_choice_begins_a_new_epoch(make_source, other, caplog):
    first = make_source({"where": "width >= 400"})
    state = first.state(3)
    make_source({"where": "(width >= 400)"}).resume(state)
    assert "new epoch" not in caplog.text
    made = make_source(other)
    made.resume(state)
    assert "source 'unlabelled' is not as it was at step 3: it begins a new epoch" in caplog.text
    assert {place.epoch for _, place in made.places(made.unlabelled, 3)} == {1}


def test_the_example_of_the_documentation_is_a_recipe(make_recipe):
    page = (Path(__file__).parents[3] / "docs" / "streaming.md").read_text(encoding="utf-8")
    _, _, section = page.partition("## Parts, filters, second labels")
    data = yaml.safe_load(section.partition("```yaml")[2].partition("```")[0])["data"]
    recipe = make_recipe(data=data)
    assert [source.shards for source in recipe.data.unlabelled][:2] == ["0-999", "1000-1999,5000"]
    assert recipe.data.labelled[0].labels == "data/labels"


def labelled(make_recipe, archive, labels, tmp_path, source=None, **data):
    sources = [{"root": str(archive), "labels": str(labels), **(source or {})}]
    data = {"labelled": sources, "cache_dir": str(tmp_path / "cache")} | data
    return make_batches(make_recipe, data=data)


def test_labels_from_another_folder(make_recipe, archive, tmp_path):
    labels = write_labels(tmp_path / "labels", [[key(n) for n in (3, 50, 4, 9)], [key(n) for n in (17, 0, 12)]])
    made = labelled(make_recipe, archive, labels, tmp_path)
    assert numbers_of(made.labelled) == [0, 3, 4, 9, 12, 17]
    assert made.notes == [
        f"labelled source 'labelled': 6 of 18 samples (labels of {labels}), 12 images without a label map in {labels}, "
        "1 label maps without an image"
    ]
    assert made.labelled_samples == 6
    batch = made[0]
    assert batch.labels.max() <= 2 or 255 in batch.labels
    assert made.class_pixels().sum() == 6 * (96 * 128 - 2 * 128)
    # All of it combines: a range, then a condition, then labels, then a part, then the draw of labelled samples.
    chosen = labelled(make_recipe, archive, labels, tmp_path, {"shards": "1-3", "where": "width <= 1200"})
    assert numbers_of(chosen.labelled) == [3, 4, 9, 12]
    half = labelled(make_recipe, archive, labels, tmp_path, {"shards": "1-3", "where": "width <= 1200", "part": 0.75})
    kept = numbers_of(half.labelled)
    assert len(kept) == 3
    drawn = labelled(
        make_recipe,
        archive,
        labels,
        tmp_path,
        {"shards": "1-3", "where": "width <= 1200", "part": 0.75},
        labelled_count=2,
    )
    assert len(numbers_of(drawn.labelled)) == 2
    assert set(numbers_of(drawn.labelled)) < set(kept)


def test_labels_stopped_and_continued(make_recipe, archive, tmp_path):
    labels = write_labels(tmp_path / "labels", [[key(n) for n in (3, 50, 4, 9)], [key(n) for n in (17, 0, 12)]])
    first = labelled(make_recipe, archive, labels, tmp_path)
    plain = taken(first, 0, 3)
    again = labelled(make_recipe, archive, labels, tmp_path)
    again.resume(json.loads(json.dumps(first.state(1))))
    assert all(same(one, other) for one, other in zip(taken(again, 1, 3), plain[1:], strict=True))


def test_a_label_map_that_is_bad(make_recipe, archive, tmp_path):
    labels = write_labels(tmp_path / "labels", [[key(3), key(4)]])
    members = [*bad_shards.sample(key(3), 3)[1:], (f"{key(4)}.png", b"no label map")]
    (labels / "l-0.tar").write_bytes(bad_shards.tar_bytes(members))
    made = labelled(make_recipe, archive, labels, tmp_path, bad_labelled="skip")
    reasons = Counter(skip.reason for batch in taken(made, 0, 3) for skip in batch.skipped if skip.source == "labelled")
    assert set(reasons) == {"not_a_label"}
    with pytest.raises(DataError, match=rf"00001\.tar, label map in l-0\.tar: {key(4)}: "):
        taken(labelled(make_recipe, archive, labels, tmp_path), 0, 3)


def test_labels_of_other_classes_are_refused(make_recipe, archive, tmp_path):
    labels = write_labels(tmp_path / "labels", [[key(3)]])
    content = json.loads((labels / "index.json").read_text())
    (labels / "index.json").write_text(json.dumps(content | {"classes": ["a", "b", "c"]}))
    with pytest.raises(DataError, match=r"labels: its classes or its ignore_index are not those of"):
        labelled(make_recipe, archive, labels, tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"shards": "0-4"}, r"shards=0-4: there is no shard 4; its index has 4 shards, numbered from 0 to 3"),
        ({"shards": "999999999999"}, r"there is no shard 999999999999"),
        (
            {"where": "widht > 3"},
            r"source 'unlabelled': where 'widht > 3': none of 18 samples has a field 'widht'; there",
        ),
        ({"where": "width > 3", "shards": "0", "stream": "x"}, r"stream 'x' is not in its index, which has unlabelled"),
        ({"where": "width > 30000"}, r"none of 18 samples is like that; choose another filter"),
    ],
)
def test_sources_that_are_refused(make_source, source, message):
    with pytest.raises(DataError, match=message) as caught:
        make_source(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"unlabelled": [{"shards": "0-9"}]}, r'shards="0-9": numbers of shards need an index .*name it as root'),
        ({"unlabelled": [{"root": "a", "shards": "9-0"}]}, r'root="a" and shards="9-0": beside root, numbers .*0-999'),
        ({"unlabelled": [{"root": "a", "shards": "x-{0..9}.tar"}]}, r"beside root, numbers .* leave out root"),
        ({"unlabelled": [{"root": "a", "part": 0}]}, r"greater than 0"),
        ({"unlabelled": [{"root": "a", "part": 1.5}]}, r"less than or equal to 1"),
        ({"unlabelled": [{"root": "a", "where": "width >"}]}, r"where 'width >': at character 8"),
        ({"unlabelled": [{"root": "a", "where": "3 > 2"}]}, r"where '3 > 2': it names no field"),
        ({"unlabelled": [{"root": "a", "labels": "b"}]}, r"a with labels=b: labels of unlabelled images are not read"),
        ({"unlabelled": [{"shards": "b.tar", "labels": "b"}]}, r"labels of unlabelled images are not read"),
        ({"labelled": [{"shards": "b.tar", "labels": "b"}]}, r"b\.tar as `shards`: labelled samples are drawn"),
    ],
)
def test_recipes_that_are_refused(make_recipe, data, message):
    with pytest.raises(RecipeError, match=message) as caught:
        make_recipe(data=data)
    assert "\n" not in str(caught.value)
