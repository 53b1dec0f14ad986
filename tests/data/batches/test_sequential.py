"""Batches from shards without an index: every sample once, the same on any processes, continued exactly."""

import itertools
import json
import threading
from collections import Counter
from contextlib import closing
from itertools import islice

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.order.epoch import permutation
from maskmatch_scale.data.remote import store_process, stream
from maskmatch_scale.recipe import RecipeError
from maskmatch_scale.seeds import derive_seed
from tests.conftest import recipe_maker
from tests.data import bad_shards
from tests.data.batches.archive import SIZES, make, place_of, sequential, state_of_all, taken, write_archive
from tests.data.batches.common import same
from tests.data.faulty_server import Fault, FaultyServer
from tests.data.remote.common import wait_until
from tests.data.s3_server import SIGNED, Bucket

SAMPLES = sum(SIZES)
EPOCH = {(shard, number) for shard, size in enumerate(SIZES) for number in range(size)}
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
"""An example takes a second."""
PLACES = place_of(epochs=30)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("archive"))


def places(batches):
    return [PLACES[position] for batch in batches for position in batch.positions]


@given(
    layouts=st.lists(
        st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(0, 5)), min_size=2, max_size=3
    ),
    window=st.sampled_from([1, 7, 50]),
)
@settings(
    max_examples=8, deadline=None, phases=NO_SHRINKING, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_stopping_anywhere_and_going_on_with_other_ranks_loses_nothing(shapes, archive, tmp_path, layouts, window):
    """Each lane gives its samples in its order, whichever ranks and batches it is read by; no sample comes twice."""
    make_recipe = recipe_maker(shapes, tmp_path)
    began_with = layouts[0][0]
    state, step, seen = None, 0, {lane: [] for lane in range(4)}
    for world_size, micro_batch, steps in layouts:
        ranks = [
            make(
                make_recipe,
                archive,
                rank,
                world_size,
                micro_batch=micro_batch,
                shuffle_window=window,
                sequential_lanes=None if state else 4,
            )
            for rank in range(world_size)
        ]
        for rank in ranks:
            if state is not None:
                rank.resume(json.loads(json.dumps(state)))
            for batch in taken(rank, step, step + steps):
                ((_, lane, _),) = batch.lanes
                seen[lane] += places([batch])
        step += steps
        state = state_of_all(ranks, step)
    # A run that is not stopped has these samples in each lane.
    for rank in range(began_with):
        plain = make(make_recipe, archive, rank, began_with, shuffle_window=window, sequential_lanes=4)
        own = range(rank * 4 // began_with, (rank + 1) * 4 // began_with)
        for number in itertools.count():
            if not any(seen[lane] for lane in own):
                break
            lane = own[number % len(own)]
            here = places([plain[number]])
            assert seen[lane][:2] == here[: len(seen[lane])]
            del seen[lane][:2]


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_sample_of_an_epoch_once_over_all_ranks(make_recipe, archive, world_size):
    """With a window of one sample a lane's first epoch is over before the next one begins."""
    ranks = [make(make_recipe, archive, rank, world_size, shuffle_window=1) for rank in range(world_size)]
    seen = Counter(place for rank in ranks for place in places(taken(rank, 0, SAMPLES)))
    assert {(shard, number) for epoch, shard, number in seen if epoch == 0} == EPOCH
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_loader_processes_do_not_change_anything(make_recipe, archive, workers):
    alone = taken(make(make_recipe, archive, sequential_lanes=4), 0, 20)
    made = make(make_recipe, archive, sequential_lanes=4, workers=workers)
    for one, other in zip(alone, load_batches(made, 0, 20), strict=True):
        assert same(one, other)
        assert one.lanes == other.lanes
    assert len(places(alone)) == 40


@pytest.mark.parametrize(("before", "after", "stop"), [(0, 2, 1), (2, 0, 7), (2, 4, 8), (4, 1, 13), (1, 2, 19)])
def test_a_run_goes_on_after_any_batch_with_any_processes(make_recipe, archive, before, after, stop):
    """Also while the processes have made batches that nobody took."""
    plain = taken(make(make_recipe, archive, sequential_lanes=4), 0, 30)
    first = make(make_recipe, archive, sequential_lanes=4, workers=before)
    with closing(load_batches(first, 0, 30)) as loaded:
        assert all(same(one, other) for one, other in zip(islice(loaded, stop), plain, strict=False))
    again = make(make_recipe, archive, workers=after)
    again.resume(json.loads(json.dumps(state_of_all([first], stop))))
    with closing(load_batches(again, stop, 30)) as loaded:
        for one, other in zip(loaded, plain[stop:], strict=True):
            assert same(one, other)


def test_a_run_whose_windows_did_not_begin_small_goes_on(make_recipe, tmp_path):
    """Checkpoints of before say nothing of the first window; all had the size of the recipe."""
    for shard in range(4):
        (tmp_path / f"a-{shard}.tar").write_bytes(bad_shards.whole(30, labelled=False))
    how = {"source": [{"shards": f"{tmp_path}/a-*.tar"}], "sequential_lanes": 1}
    in_order = positions(taken(make(make_recipe, tmp_path, shuffle_window=1, **how), 0, 50))
    made = make(make_recipe, tmp_path, shuffle_window=100, **how)
    (source,) = made.sequential
    order = permutation(derive_seed(derive_seed(source.seed, "order", source.name), "window", 0, 0), 100)
    state = state_of_all([made], 20)
    del state["sequential"]["first_window"]
    state["ranks"] = [{"lanes": {source.name: {"0": [0, 0, 0, 0, 40]}}}]
    for step in (20, 30):  # and then from a checkpoint of its own
        again = make(make_recipe, tmp_path, shuffle_window=100, **how)
        again.resume(json.loads(json.dumps(state)))
        found = positions(taken(again, step, step + 10))
        assert found == [in_order[number] for number in order[2 * step : 2 * step + 20]]
        state = state_of_all([again], step + 10)


def positions(batches):
    return [position for batch in batches for position in batch.positions]


def test_mixed_with_an_indexed_source_at_exact_weights(make_recipe, shapes, archive):
    mixed = [{"root": str(shapes), "weight": 2}, sequential(archive)]
    made = make(make_recipe, archive, source=mixed, micro_batch=3, sequential_lanes=2)
    batches = taken(made, 0, 30)
    assert {sum(position in PLACES for position in batch.positions) for batch in batches} == {1}
    # The indexed source has the order that it has with an indexed one beside it.
    beside = [{"root": str(shapes), "weight": 2}, {"root": str(shapes), "name": "other"}]
    indexed = taken(make(make_recipe, archive, source=beside, micro_batch=3), 0, 30)
    other = [p for batch in batches for p in batch.positions if p not in PLACES]
    assert other == [p for batch in indexed for p in batch.positions if p in set(other)]
    assert len(other) == 60


def test_two_archives_have_orders_of_their_own(make_recipe, archive):
    both = [sequential(archive), sequential(archive, name="again")]
    batches = taken(make(make_recipe, archive, source=both, shuffle_window=1), 0, SAMPLES)
    again = place_of(name="again")
    one = [PLACES[p] for batch in batches for p in batch.positions if p in PLACES]
    two = [again[p] for batch in batches for p in batch.positions if p in again]
    assert set(one) == set(two) == {(0, *place) for place in EPOCH}
    assert one != two


FAULTS = {
    "a-000.tar": [Fault(times=2, status=503)],
    "a-001.tar": [Fault(times=3, cut_after=9000)],
    "a-003.tar": [Fault(times=1, stall_after=12000)],
    "a-004.tar": [Fault(times=1, cut_after=20000, reset=True)],
    "a-006.tar": [Fault(chunked=True)],
    "a-007.tar": [Fault(no_length=True)],
}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_fails_changes_nothing(make_recipe, archive, ranges):
    plain = taken(make(make_recipe, archive), 0, SAMPLES // 2)
    with FaultyServer(archive, FAULTS, ranges=ranges) as server:
        made = make(make_recipe, server.url, fetch_timeout_s=0.5)
        batches = taken(made, 0, SAMPLES // 2)
        assert all(same(one, other) for one, other in zip(batches, plain, strict=True))
        assert not any(batch.skipped for batch in batches)
        sent = sum(request.sent for request in server.requests)
    fetched = sum((batch.fetched for batch in batches[1:]), batches[0].fetched)
    assert fetched.failed_tries == 7
    whole = sum(file.stat().st_size for file in archive.glob("*.tar"))
    asked = {request.path for request in server.requests}
    assert len(asked) == len(SIZES)
    if ranges:  # each byte once, and those of the shard with which the second epoch begins
        assert sent <= 1.5 * whole
    assert whole <= fetched.bytes <= 1.5 * whole


def test_bad_samples_are_skipped_and_the_next_of_the_lane_takes_the_place(make_recipe, tmp_path):
    folder = write_archive(tmp_path / "spoilt")
    (folder / "a-002.tar").write_bytes(b"<html>not found</html>" * 100)
    (folder / "a-005.tar").unlink()
    whole = (folder / "a-004.tar").read_bytes()
    (folder / "a-004.tar").write_bytes(whole[: len(whole) // 2])
    members = [
        *bad_shards.sample("whole", labelled=False),
        ("text.jpg", b"no image"),
        bad_shards.special("link.jpg", b"2", "/etc/passwd"),
        ("../up.jpg", bad_shards.jpeg(1)),
        ("thing.pkl", b"\x80"),
        ("empty.jpg", b""),
    ]
    (folder / "a-000.tar").write_bytes(bad_shards.tar_bytes(members))
    source = [sequential(folder) | {"shards": f"{folder}/*.tar"}]
    made = make(make_recipe, folder, source=source, shuffle_window=3, sequential_lanes=2)
    batches = taken(made, 0, 12)
    reasons = Counter((skip.key, skip.reason) for batch in batches for skip in batch.skipped)
    assert {
        ("text", "not_an_image"): 1,
        ("link", "unsafe_name"): 1,
        ("../up", "unsafe_name"): 1,
        ("thing", "pickled"): 1,
        ("empty", "empty"): 1,
        (None, "shard_unreadable"): 1,
    }.items() <= reasons.items()
    assert sum(count for (_, reason), count in reasons.items() if reason == "truncated") == 1
    assert all(len(batch.unlabelled_images) == 2 for batch in batches)
    # Stopped in between, the counts go on, too.
    first = make(make_recipe, folder, source=source, shuffle_window=3, sequential_lanes=2)
    before = taken(first, 0, 5)
    again = make(make_recipe, folder, source=source, shuffle_window=3)
    again.resume(state_of_all([first], 5))
    after = taken(again, 5, 12)
    assert [batch.skipped for batch in before + after] == [batch.skipped for batch in batches]


def test_bad_samples_may_be_errors(make_recipe, tmp_path):
    folder = write_archive(tmp_path / "spoilt")
    (folder / "a-003.tar").write_bytes(bad_shards.tar_bytes([("text.jpg", b"no image")]))
    made = make(make_recipe, folder, bad_unlabelled="fail")
    with pytest.raises(DataError, match=r"a-003\.tar: text"):
        taken(made, 0, SAMPLES)


def test_an_archive_that_is_not_there_ends_the_run(make_recipe, archive):
    with FaultyServer(archive) as server:
        made = make(make_recipe, f"{server.url}/elsewhere")
        with pytest.raises(DataError, match=r"'archive': 48 samples in a row.*elsewhere/a-00\d\.tar.*HTTP 404"):
            taken(made, 0, 1)


def test_in_an_outage_batches_are_filled_and_the_lanes_stay(make_recipe, archive):
    plain = taken(make(make_recipe, archive), 0, 25)
    with FaultyServer(archive) as server:
        made = make(make_recipe, server.url, outage_s=0.3, fetch_attempts=2)
        before = taken(made, 0, 4)
        server.set_faults({"*": Fault(status=503)})
        during = taken(made, 4, 25)
        lost = [skip for batch in during for skip in batch.skipped]
        assert {(skip.reason, skip.source) for skip in lost} == {("unreachable", "archive")}
        whole = [batch for batch in before + during if not batch.skipped]
        assert all(same(one, other) for one, other in zip(whole, plain, strict=False))
        # The run stops soon, and later goes on with what it has not had.
        server.set_faults({})
        again = make(make_recipe, server.url)
        again.resume(state_of_all([made], 25))
        rest = places(taken(again, 25, 25 + SAMPLES // 2))
    complete = sum(len(batch.positions) for batch in whole)
    straight = places(taken(make(make_recipe, archive), 0, 50))
    assert straight.index(rest[0]) in range(complete, complete + 2)
    assert rest[:20] == straight[straight.index(rest[0]) :][:20]


def test_other_shards_begin_a_new_epoch(make_recipe, archive, caplog):
    first = make(make_recipe, archive)
    taken(first, 0, 3)
    state = state_of_all([first], 3)
    fewer = [sequential(archive) | {"shards": f"{archive}/a-{{000..005}}.tar"}]
    for changed in ({"source": fewer}, {"sequential_lanes": 3}, {"shuffle_window": 9}):
        caplog.clear()
        made = make(make_recipe, archive, **changed)
        made.resume(state)
        assert "'archive' is not as it was at step 3: it begins a new epoch" in caplog.text
        assert {epoch for epoch, *_ in places(taken(made, 3, 5))} == {1}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"unlabelled": [{"name": "x"}]}, r"root=null and shards=null: a source needs one of them"),
        ({"unlabelled": [{"root": "a", "shards": "b.tar"}]}, r'root="a" and shards="b\.tar": beside root, numbers'),
        ({"unlabelled": [{"shards": "b.tar", "stream": "c"}]}, r"stream='c': streams are listed in an index"),
        ({"labelled": [{"shards": "b.tar"}]}, r"labelled: b\.tar as `shards`: .*shards index"),
        ({"unlabelled": [{"shards": "pipe:curl -H SECRET x"}]}, r"pipe:curl: pipe: runs.*data\.allow_pipe=true"),
    ],
)
def test_recipes_that_are_refused(make_recipe, data, message):
    with pytest.raises(RecipeError, match=message) as caught:
        make_recipe(data=data)
    assert "SECRET" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "data", "message"),
    [
        ({"shards": "{}/none-*.tar"}, {}, r"none-\*\.tar: no such file"),
        ({"shards": "{}"}, {}, r"'archive': .*archive\d is a folder; name .*\(.*/archive\d/\*\.tar\), or give"),
        ({"shards": "{}/{{a-000,a-000}}.tar"}, {}, r"a-000\.tar is listed twice"),
        ({}, {"sequential_lanes": 9}, r"source 'archive': 8 shards for 9 lanes"),
        ({}, {"sequential_lanes": 3, "workers": 2}, r"sequential_lanes=3: 1 ranks × 2 loader .* a multiple of 2"),
        ({}, {"workers": 9}, r"8 shards for 9 lanes .*lower data\.workers"),
    ],
)
def test_sources_that_are_refused(make_recipe, archive, source, data, message):
    source = {key: value.format(archive) for key, value in source.items()}
    with pytest.raises(DataError, match=message):
        make(make_recipe, archive, source=[sequential(archive) | source], **data)


def test_two_sources_of_one_name_are_refused(make_recipe, shapes, archive):
    with pytest.raises(DataError, match=r"data\.unlabelled: two sources are called 'unlabelled'"):
        make(make_recipe, archive, source=[{"root": str(shapes)}, sequential(archive) | {"name": None}])


def test_when_batches_end_nothing_is_fetched_any_more(make_recipe, archive, monkeypatch):
    """Also if the objects live on; and if more batches are wanted they are those that follow."""
    monkeypatch.setattr(stream, "_AHEAD_BYTES", 1000)  # less than a shard has
    plain = taken(make(make_recipe, archive), 0, 12)
    with FaultyServer(archive) as server:
        made = make(make_recipe, server.url)
        first = taken(made, 0, 5)
        wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name == "shard stream"])
        rest = taken(made, 5, 12)
    assert all(same(one, other) for one, other in zip(first + rest, plain, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_that_an_object_store_lists(make_recipe, archive, s3_server, monkeypatch, workers):
    """A rank leaves obstore to a process of its own, a loader process uses it: both give what local shards give."""
    store_process.end_all()  # those of other tests have another environment
    for name, value in {**SIGNED, "AWS_ENDPOINT_URL": f"http://{s3_server}"}.items():
        monkeypatch.setenv(name, value)
    bucket = Bucket(s3_server, f"sequential{workers}").make()
    for shard in sorted(archive.glob("*.tar")):
        bucket.put(f"a/{shard.name}", shard.read_bytes())
    there = [sequential(archive) | {"shards": f"s3://{bucket.name}/a/*.tar"}]
    made = make(make_recipe, archive, source=there, sequential_lanes=2, workers=workers)
    here = taken(make(make_recipe, archive, sequential_lanes=2), 0, SAMPLES // 2)
    try:
        with closing(load_batches(made, 0, 100)) as loaded:
            assert all(same(one, other) for one, other in zip(islice(loaded, len(here)), here, strict=True))
        # Going on from there, with obstore in the other place.
        again = make(make_recipe, archive, source=there, workers=2 - workers)
        again.resume(state_of_all([made], len(here)))
        with closing(load_batches(again, len(here), 100)) as loaded:
            rest = list(islice(loaded, 6))
    finally:
        store_process.end_all()
    straight = taken(make(make_recipe, archive, sequential_lanes=2), 0, len(here) + 6)
    assert all(same(one, other) for one, other in zip(rest, straight[len(here) :], strict=True))
