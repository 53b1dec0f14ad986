"""An archive of shards without an index, and which of its samples a batch shows."""

from __future__ import annotations

from pathlib import Path

from maskmatch_scale.data.batches.loading import load_batches
from maskmatch_scale.data.batches.training import TrainingBatches
from maskmatch_scale.seeds import derive_seed
from tests.data import bad_shards
from tests.data.batches.common import make_batches

SIZES = (3, 5, 1, 4, 6, 2, 4, 5)
"""Samples of its shards."""
_PLACES_OF_A_SHARD = 1 << 32


def write_archive(folder: Path) -> Path:
    """Shards `a-000.tar` and so on, each sample with a text and a JSON file, as img2dataset writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, size in enumerate(SIZES):
        members = [
            member
            for number in range(size)
            for member in [
                *bad_shards.sample(f"{shard:03d}{number:06d}", 10 * shard + number, labelled=False),
                (f"{shard:03d}{number:06d}.json", b"{}"),
                (f"{shard:03d}{number:06d}.txt", b"a shape"),
            ]
        ]
        (folder / f"a-{shard:03d}.tar").write_bytes(bad_shards.tar_bytes(members))
    return folder


def sequential(folder: Path | str, **more):
    """The archive as a source of a recipe."""
    return {"shards": f"{folder}/a-{{000..{len(SIZES) - 1:03d}}}.tar", "name": "archive"} | more


def place_of(seed=0, epochs=4, name="archive"):
    """From a position of a batch to (epoch, shard, number in it) of the archive's sample."""
    return {
        derive_seed(seed, "place", name, epoch, shard * _PLACES_OF_A_SHARD + number): (epoch, shard, number)
        for epoch in range(epochs)
        for shard, size in enumerate(SIZES)
        for number in range(size)
    }


def state_of_all(ranks: list[TrainingBatches], step: int):
    """What `stream.json` has of a run with these ranks."""
    return ranks[0].state(step) | {"ranks": [rank.own_state() for rank in ranks]}


def make(make_recipe, archive, rank=0, world_size=1, *, source=None, micro_batch=2, steps=1000, **data):
    """The batches of a rank, whose unlabelled images are from the archive, or from the sources that are given."""
    data = {"unlabelled": source or [sequential(archive)], "shuffle_window": 5} | data
    return make_batches(
        make_recipe,
        rank,
        world_size,
        data=data,
        engine={"micro_batch": micro_batch},
        method={"burn_in": 0},
        run={"steps": steps},
    )


def taken(made, start, stop):
    """The batches of one rank in this process."""
    return list(load_batches(made, start, stop))
