"""Two hosts that differ, as two launchers of one rank each with an environment and mounts of their own."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import maskmatch_scale
from benchmarks.drill_hosts.hosts import Hosts, why_no_hosts
from maskmatch_scale.engine.setup import _free_port
from tests.conftest import ShapesSource, recipe_maker, write_shards
from tests.distributed.launching import BIN, environment, records

pytestmark = pytest.mark.distributed
PACKAGE = Path(maskmatch_scale.__file__).parent
needs_mounts = pytest.mark.skipif(
    bool(os.geteuid()) or not shutil.which("unshare"), reason="needs root and unshare, for mounts of one host"
)


def launched(arguments, *, mounts=("", ""), env=({}, {})):
    """What two hosts say and end with: (exit code, its stderr and stdout) of each.

    Args:
        arguments: of `maskmatch train`, for each of them.
        mounts: shell commands by which a host mounts something for itself alone.
        env: added to the environment of each.
    """
    port, started = _free_port(), []
    for host in range(2):
        command = [
            str(BIN / "torchrun"), "--nnodes", "2", "--node_rank", str(host), "--nproc-per-node", "1",
            "--master_addr", "127.0.0.1", "--master_port", str(port), "-m", "maskmatch_scale", "train",
            *map(str, arguments[host]),
        ]  # fmt: skip
        if mounts[host]:
            command = ["unshare", "--mount", "bash", "-ec", f'{mounts[host]}; exec "$@"', "-", *command]
        own = {"PYTHONPATH": str(PACKAGE.parent), "MASKMATCH_EXIT_CODE_FILE": f"{arguments[host][0]}.code-{host}"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # Python looks for the package in the working directory first.
        started.append(subprocess.Popen(command, env=environment(**own | env[host]), cwd="/", **pipes))
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    ends = [Path(arguments[host][0] + f".code-{host}") for host in range(2)]
    return [(int(end.read_text()) if end.exists() else 0, out) for end, out in zip(ends, outputs, strict=True)]


def error_of(output):
    """The line by which `maskmatch` has ended."""
    (line,) = re.findall(r"^maskmatch: error: .*$", output, re.MULTILINE)
    return line


@pytest.fixture
def recipe(shapes, tmp_path):
    """Path of a recipe; its run directory is `run/run`."""
    (tmp_path / "run").mkdir()
    made = recipe_maker(shapes, tmp_path / "run")(engine={"precision": "fp32"})
    path = tmp_path / "recipe.yaml"
    path.write_text(made.to_yaml())
    return str(path)


@needs_mounts
def test_other_code_other_data_and_a_run_folder_of_its_own_are_named_before_anything_is_written(
    recipe, shapes, tmp_path
):
    overlay = tmp_path / "overlay"
    shutil.copytree(PACKAGE, overlay / "maskmatch_scale")
    with (overlay / "maskmatch_scale" / "seeds.py").open("a") as file:
        file.write("\n# changed\n")
    other = tmp_path / "other"
    write_shards(ShapesSource({"labelled": 8, "unlabelled": 20, "dev": 5, "val": 5}), other, workers=1, progress=False)
    mounts = f"mount -t tmpfs tmpfs {tmp_path}/run; mount --bind {other} {shapes}"
    ends = launched([[recipe], [recipe]], mounts=("", mounts), env=({}, {"PYTHONPATH": str(overlay)}))
    assert [code for code, _ in ends] == [2, 2]
    name = os.uname().nodename
    for _, output in ends:
        line = error_of(output)
        first, second = f"{name} (rank 0)", f"{name} (rank 1)"
        assert re.search(
            rf"the code of maskmatch_scale: \w+ in {overlay}/maskmatch_scale on {re.escape(second)}, and \w+ in \S+ on "
            rf"{re.escape(first)}; install the same commit on all hosts",
            line,
        )
        assert re.search(
            rf"the index of {shapes} is \w+ on {re.escape(second)}, and \w+ on {re.escape(first)}; every host", line
        )
        assert f"run.dir is not shared: {second} cannot see what {first} writes there; put it on a disk" in line
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("failing", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_whose_own_checks_fail_ends_the_others_too(recipe, tmp_path, failing):
    arguments = [[recipe], [recipe]]
    arguments[failing].append("data.root=/nowhere")
    ends = launched(arguments)
    assert [code for code, _ in ends] == [2, 2]
    own, other = error_of(ends[failing][1]), error_of(ends[1 - failing][1])
    assert "data.root=/nowhere: no such folder" in own
    assert f"rank {failing} on {os.uname().nodename} has failed its checks: data.root=/nowhere: no such folder" in other
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_hosts_that_are_alike_train_as_one_host_does(recipe, tmp_path):
    ends = launched([[recipe], [recipe]])
    assert [code for code, _ in ends] == [0, 0], ends[0][1] + ends[1][1]
    run = tmp_path / "run" / "run"
    assert re.search(r"links: all-reduce over 2 ranks \S+ [GM]B/s; a pair of hosts \S+ [GM]B/s each way", ends[0][1])
    alone = tmp_path / "run" / "alone"
    done = subprocess.run(
        [BIN / "torchrun", "--nproc-per-node", "2", "--master_port", str(_free_port()), "-m", "maskmatch_scale",
         "train", recipe, f"run.dir={alone}"],
        env=environment(), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [[record["loss"] for record in records(folder)] for folder in (run, alone)]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.skipif(why_no_hosts("pdsh") is not None, reason=str(why_no_hosts("pdsh")))
def test_deepspeed_over_ssh_ends_with_the_line_that_names_the_host(recipe, tmp_path):
    variables = tmp_path / "variables"
    variables.write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    with Hosts(2) as hosts:
        hosts[1].do(f"mount -t tmpfs tmpfs {tmp_path}/run")
        command = [
            BIN / "deepspeed", "--hostfile", hosts.write_hostfile(tmp_path / "hostfile"), "--force_multi",
            "--no_local_rank", "--master_port", _free_port(), "--module", "maskmatch_scale", "train", recipe,
        ]  # fmt: skip
        env = environment(PYTHONPATH=str(PACKAGE.parent), DS_ENV_FILE=str(variables))
        done = hosts[0].run(command, env=env, timeout=400)
    assert done.returncode == 2, done.stderr
    line = "run.dir is not shared: host-2 (rank 1) cannot see what host-1 (rank 0) writes there; put it on a disk that"
    assert f"host-1: maskmatch: error: {line}" in done.stderr
    assert f"host-2: maskmatch: error: rank 1: {line}" in done.stderr
    assert list((tmp_path / "run").iterdir()) == []
