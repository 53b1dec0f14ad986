"""What hosts read, by the rate of the loader's benchmark; counts of data that are here."""

import json
from pathlib import Path

import pytest

from maskmatch_scale.planning import efficiency
from maskmatch_scale.planning.hardware import cluster_of, gpu_named
from maskmatch_scale.planning.loading import Counts, count, loading
from tests.planning.subjects import VIT, built_of

ROOT = Path(__file__).parents[2]


def test_the_rate_of_a_core_is_that_of_the_benchmark():
    found = json.loads((ROOT / "benchmarks/results/loader.json").read_text())
    [row] = [
        row
        for row in found["rows"]
        if (row["variant"], row["over"], row["processes"], row["environment"]) == ("ours", "local", 2, "main")
    ]
    assert pytest.approx(row["samples_per_core_s"], rel=0.01) == efficiency.DECODED_A_CORE
    assert pytest.approx(found["machine"]["jpeg_kb"] * 1e3, rel=0.01) == efficiency.DECODED_BYTES


def test_cores_and_bytes_follow_the_images():
    read = loading(3460, 2.0, Counts())
    assert read.images_per_s == 1730
    assert read.cores == pytest.approx(5, rel=0.01)
    assert read.bytes_per_s == pytest.approx(1730 * efficiency.DECODED_BYTES)
    assert not read.bytes_known
    large = loading(3460, 2.0, Counts(bytes_a_sample=2 * efficiency.DECODED_BYTES))
    assert large.cores == pytest.approx(2 * read.cores)
    assert large.bytes_known


def test_the_loader_is_as_fast_as_its_processes_and_cores():
    read = loading(346, 1.0, Counts())
    assert read.fastest_step_s(346, cores=16, workers=1, ranks=2) == pytest.approx(0.5, rel=0.01)
    assert read.fastest_step_s(346, cores=1, workers=8, ranks=2) == pytest.approx(1, rel=0.01)
    assert read.fastest_step_s(346, cores=16, workers=0, ranks=1) == pytest.approx(1, rel=0.01)


def test_samples_are_counted_where_data_are_here(shapes):
    built = built_of(VIT | {"num_classes": None}, data={"root": str(shapes), "labelled_count": 4})
    found = count(built.subject, built.index, cluster_of(2, gpu_named("h100")))
    assert (found.labelled, found.unlabelled) == (4, 24)
    assert found.bytes_a_sample > 1000
    assert count(built.subject, None, cluster_of(2, gpu_named("h100"))) == Counts()
