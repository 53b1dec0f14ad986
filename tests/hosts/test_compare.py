"""Hosts that differ: which are named, what stops a run, and what is only odd."""

from dataclasses import replace

import pytest

from maskmatch_scale.hosts.compare import Report, compare, compare_clocks, compare_slots
from maskmatch_scale.hosts.facts import Facts, Gpu
from maskmatch_scale.hosts.job import JobFacts

GPU = Gpu("H100", 80, 1980, 700)
HERE = replace(Facts.here(), gpus=(GPU,) * 8, shared_memory_gib=10.0, addresses={})
JOB = JobFacts("bf16", {"/data": "aa"}, (), (), True, 100.0, "/cache", 100.0)


def reports(*changed, hosts=4):
    """Reports of hosts a, b, c, …; ``changed`` has (host, changes of its facts, changes of its job)."""
    found = {name: Report(name, replace(HERE, host=name), JOB) for name in "abcdefgh"[:hosts]}
    for name, facts, job in changed:
        found[name] = Report(name, replace(found[name].facts, **facts), replace(JOB, **job))
    return list(found.values())


def found_in(*changed, hosts=4):
    return [(finding.line, finding.stops) for finding in compare(reports(*changed, hosts=hosts), "a")]


def with_version(**versions):
    return {"versions": HERE.versions | versions}


def test_hosts_that_are_alike_give_no_line():
    assert found_in() == []
    assert found_in(hosts=1) == []


def test_the_odd_one_out_is_named_first_even_if_it_is_the_first_host():
    ((line, stops),) = found_in(("a", with_version(torch="2.6.0"), {}))
    assert stops
    assert line == (
        f"versions: torch 2.6.0 on a, and torch {HERE.versions['torch']} on b, c, d; give all hosts one environment"
    )


def test_packages_of_one_environment_are_one_line():
    ((line, stops),) = found_in(("b", with_version(torch="2.6.0", timm="1.0.20"), {}), hosts=2)
    assert stops
    assert line.startswith("versions: torch 2.6.0, timm 1.0.20 on b, and torch ")


@pytest.mark.parametrize(
    ("facts", "job", "part", "stops"),
    [
        (with_version(deepspeed="0.18.0"), {}, "deepspeed 0.18.0 on c, and ", True),
        (with_version(maskmatch_scale="0.0.9"), {}, "maskmatch_scale 0.0.9 on c, and ", True),
        (with_version(pillow="11.0"), {}, "pillow 11.0 on c, and ", False),
        ({"source": "ff", "folder": "/x"}, {}, "the code of maskmatch_scale: ff in /x on c, and ", True),
        ({"gpus": ()}, {}, "GPUs: none on c, and 8 × H100, 80 GiB on a, b, d; ranks on GPUs and on CPUs", True),
        ({"gpus": (Gpu("A100", 40),) * 8}, {}, "8 × A100, 40 GiB on c, and ", False),
        ({"gpus": (GPU,) * 7 + (replace(GPU, clock_mhz=1200),)}, {}, "a GPU of c has 1200 MHz at most, else", False),
        ({"gpus": (GPU,) * 7 + (replace(GPU, power_w=300),)}, {}, "a GPU of c has 300 W at most, elsewhere 700", False),
        ({"omp_threads": "64"}, {}, "OMP_NUM_THREADS is 64 on c, and ", False),
        ({"shared_memory_gib": 0.06}, {}, "c: 0.06 GiB are free for /dev/shm; give the container more", False),
        ({}, {"run_free_gib": 1.0}, "c: 1 GiB are free for run.dir; free some", False),
        ({}, {"cache_free_gib": 1.5}, "c: 1.5 GiB are free for the cache of shards", False),
        ({}, {"data": {"/data": "bb"}}, "the index of /data is bb on c, and aa on a, b, d; every host needs", True),
        ({}, {"faults": ("/data: no index",)}, "c: /data: no index", True),
        ({}, {"unreached": ("s3://x: no connection",)}, "c: s3://x: no connection", True),
        ({}, {"precision": "fp32"}, "engine.precision is fp32 on c, and bf16 on a, b, d", True),
        ({}, {"sees_run_dir": False}, "run.dir is not shared: c cannot see what a writes there; put it on a", True),
        (
            {"addresses": {"own": "127.0.1.1", "towards": "10.0.0.3", "interface": "eth0"}}, {},
            "c: its name c stands for 127.0.1.1 there, on which gloo listens", False,
        ),
    ],
)  # fmt: skip
def test_what_differs_is_one_line_with_the_host(facts, job, part, stops):
    ((line, said),) = found_in(("c", facts, job))
    assert part in line
    assert said == stops


def test_what_stops_a_run_comes_first_and_many_hosts_are_counted():
    odd = [(name, {"omp_threads": "9"} | with_version(torch="1"), {}) for name in "bcdefg"]
    (first, stops), (second, warns) = found_in(*odd, hosts=8)
    assert (stops, warns) == (True, False)
    assert f"torch {HERE.versions['torch']} on a, h, and torch 1 on b, c, d, e and 2 more" in first
    assert "OMP_NUM_THREADS" in second


def test_a_mistake_that_all_hosts_share_is_one_line():
    ((line, _),) = found_in(*((name, {}, {"faults": ("no such folder",)}) for name in "abcd"))
    assert line == "a, b, c, d: no such folder"
    ((line, stops),) = found_in(*((name, {}, {"unreached": ("x.tar: no such file",)}) for name in "abcd"))
    assert (line, stops) == ("a, b, c, d: x.tar: no such file", False)  # a run may be made to skip it


def test_clocks():
    assert compare_clocks({"a": 100.0, "b": 101.0, "c": 99.5}) == []
    (finding,) = compare_clocks({"a": 100.0, "b": 160.0})
    assert "the clock of b is +60.0 s off" in finding.line
    assert not finding.stops


def test_slots():
    assert compare_slots(reports(hosts=2), {"a": 8, "b": 8}) == []
    more, fewer = compare_slots(reports(hosts=2), {"a": 9, "b": 4})
    assert "a: slots=9, but 8 GPUs are found there; write slots=8" in more.line
    assert "b: slots=4 leaves 4 of 8 GPUs unused" in fewer.line
    assert (more.stops, fewer.stops) == (True, False)
    on_cpus = reports(("a", {"gpus": ()}, {}), ("b", {"gpus": ()}, {}), hosts=2)
    assert compare_slots(on_cpus, {"a": 2, "b": 3}) == []
