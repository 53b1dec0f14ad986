"""`doctor --hosts`: what is run on other hosts, and over real ssh between hosts of namespaces what they answer."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import maskmatch_scale
from benchmarks.drill_hosts.hosts import Hosts, why_no_hosts
from maskmatch_scale import __version__
from maskmatch_scale.hosts import by_ssh
from tests.conftest import recipe_maker
from tests.distributed.launching import environment

PACKAGE = Path(maskmatch_scale.__file__).parent
needs_hosts = pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts()))


def test_the_script_enters_the_folder_and_passes_variables_on_as_deepspeed_does(tmp_path, monkeypatch):
    folder = tmp_path / "it's here"
    folder.mkdir()
    (folder / ".deepspeed_env").write_text("MY_KEY=a=b c\n")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NCCL_DEBUG", "WARN; $(x)")
    monkeypatch.setenv("PYTHONPATH", "/first")
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "show"))
    show = "import os, sys\nprint([os.getcwd(), sys.argv[1:], {k: os.environ.get(k) for k in sys.argv[-1].split(',')}])"
    Path(sys.executable).write_text(f"#!/usr/bin/env python3\n{show}\n")
    Path(sys.executable).chmod(0o755)
    names = "NCCL_DEBUG,PYTHONPATH,MY_KEY,RANK,SECRET"
    script = by_ssh.remote_script(["doctor", "a b", names], {"RANK": "3"})
    done = subprocess.run(
        ["sh", "-s"], input=script, cwd="/", env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True
    )
    assert eval(done.stdout) == [
        str(folder),
        ["-m", "maskmatch_scale", "doctor", "a b", names],
        {"NCCL_DEBUG": "WARN; $(x)", "PYTHONPATH": f"{folder}:/first", "MY_KEY": "a=b c", "RANK": "3", "SECRET": None},
    ]


def test_a_folder_or_python_that_is_missing_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")

    def ended():
        done = subprocess.run(["sh", "-s"], input=by_ssh.remote_script([]), capture_output=True, text=True, check=False)
        return by_ssh.explained(done.returncode, done.stderr)

    monkeypatch.chdir(tmp_path)
    assert ended() == "it has no /nowhere/python; put the Python environment on a disk that all hosts mount alike"
    script = by_ssh.remote_script([])
    monkeypatch.setattr(by_ssh, "remote_script", lambda words: script.replace(str(tmp_path), f"{tmp_path}/gone"))
    assert ended().startswith(f"it has no folder {tmp_path}; start from a folder that all hosts share")


def test_no_variable_stands_on_a_command_line(tmp_path, monkeypatch):
    """An `ssh` that keeps its command line, and runs what it is given here."""
    (tmp_path / ".deepspeed_env").write_text("STORE_TOKEN=of-a-file\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    ssh, python = tools / "ssh", tools / "python"
    ssh.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/seen\nshift $(($# - 1))\nexec sh -c "$1"\n')
    shown = '{"facts": null, "job": null, "time": 0, "token": "\'$STORE_TOKEN$NCCL_KEY\'"}'
    python.write_text(f"#!/bin/sh\necho '{shown}'\n")
    ssh.chmod(0o755), python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("NCCL_KEY", "of-the-environment")
    monkeypatch.setattr(sys, "executable", str(python))
    answer = by_ssh._answer("gpu-a", by_ssh.remote_script(["doctor"]))
    assert answer.values["token"] == "of-a-fileof-the-environment"
    assert "gpu-a" in (tmp_path / "seen").read_text()
    assert "of-" not in (tmp_path / "seen").read_text()


@pytest.mark.parametrize(
    ("code", "errors", "said"),
    [
        (255, "ssh: Could not resolve hostname gpu-x: Name or service not known\n", "; correct its name in the"),
        (255, "ssh: connect to host b port 22: Connection refused\r\n", "Connection refused; start sshd there"),
        (255, "root@b: Permission denied (publickey).\n", "Permission denied (publickey).; let a key"),
        (255, "ssh: connect to host b port 22: No route to host\n", "; look whether it is up"),
        (1, "/x/python: No module named maskmatch_scale\n", "Python finds no module maskmatch_scale there"),
        (2, "Usage: …\n╭─ Error ─╮\n│ No such option: --as-host │\n", "its maskmatch_scale is another version"),
        (2, "warning\nmaskmatch: error: r.yaml: no such file\n", "r.yaml: no such file"),
        (1, "OSError: https://user:password@store/x?sig=abc\n", "OSError: https://store/x; run "),
        (139, "", "exit code 139; run "),
    ],
)  # fmt: skip
def test_faults_are_explained(code, errors, said):
    assert said in by_ssh.explained(code, errors)
    assert "\n" not in by_ssh.explained(code, errors)


@pytest.fixture(scope="module")
def hosts():
    with Hosts(4) as made:
        yield made


def doctor(hosts, *arguments):
    """(exit code, stdout, stderr) of `maskmatch doctor …` on the first host."""
    command = [sys.executable, "-m", "maskmatch_scale", "doctor", *arguments]
    env = environment(PYTHONPATH=str(PACKAGE.parent), COLUMNS="200")
    done = hosts[0].run(command, env=env, timeout=300)
    return done.returncode, done.stdout, done.stderr


@needs_hosts
@pytest.mark.slow
def test_hosts_that_are_alike_pass_and_those_that_are_not_are_named(hosts, shapes, tmp_path):
    run = tmp_path / "runs"
    run.mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_maker(shapes, run)(engine={"precision": "fp32"}).to_yaml())
    file = hosts.write_hostfile(tmp_path / "hostfile")

    code, out, err = doctor(hosts, "--hosts", file, recipe, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert list(found["hosts"]) == ["host-1", "host-2", "host-3", "host-4"]
    assert not any(finding["stops"] for finding in found["findings"])
    for number, said in enumerate(found["hosts"].values(), 1):
        assert (said["slots"], said["error"], said["facts"]["host"]) == (1, None, f"host-{number}")
        assert said["facts"]["addresses"]["own"] == f"10.177.0.{number}"
        assert number == 1 or said["facts"]["addresses"]["interface"] == "eth0"  # towards itself it is lo
        assert said["job"]["sees_run_dir"] is True
        assert abs(said["clock"]) < 60
    assert not list(run.iterdir())

    overlay = tmp_path / "overlay"
    shutil.copytree(PACKAGE, overlay)
    (overlay / "__init__.py").write_text('"""Older."""\n\n__version__ = "0.0.9"\n')
    hosts[1].do(f"mount --bind {overlay} {PACKAGE}\nmount -t tmpfs tmpfs {run}")
    hosts[2].do(f"mount -t tmpfs tmpfs {Path(sys.executable).parent}")
    hosts[3].do("kill $(pgrep -o sshd)")
    file.write_text(file.read_text() + "host-9 slots=1\n")
    code, out, err = doctor(hosts, "--hosts", file, recipe)
    assert code == 2
    assert err.splitlines()[-1] == (
        f"maskmatch: error: --hosts {file}: a run would not start, or be wrong, for 5 reasons, listed on stdout"
    )
    lines = [line for line in out.splitlines() if line.startswith("error: ")]
    for part in (
        f"error: host-3: it has no {sys.executable}; put the Python environment on a disk",
        "error: host-4: ssh: connect to host host-4 port 22: Connection refused; start sshd there",
        "error: host-9: ssh: Could not resolve hostname host-9: ",
        f"error: versions: maskmatch_scale 0.0.9 on host-2, and maskmatch_scale {__version__} on host-1; give all",
        "error: run.dir is not shared: host-2 cannot see what this machine writes there; put it on a disk",
    ):
        assert len([line for line in lines if line.startswith(part)]) == 1, (part, lines)
    assert len(lines) == 5
    assert [line.split("│")[1].strip() for line in out.splitlines() if "│ host-" in line] == [
        "host-1", "host-2", "host-3", "host-4", "host-9",
    ]  # fmt: skip
    assert "no answer" in out


@needs_hosts
@pytest.mark.slow
@pytest.mark.skipif(why_no_hosts("tc") is not None, reason=str(why_no_hosts("tc")))
def test_a_slow_link_is_named(tmp_path):
    with Hosts(3) as hosts:
        hosts[2].limit(20)
        file = hosts.write_hostfile(tmp_path / "hostfile")
        code, out, err = doctor(hosts, "--hosts", file, "--bandwidth", "--json")
        assert code == 0, err
        found = json.loads(out)
        assert found["links"].startswith("links: all-reduce over 3 ranks ")
        (slow,) = [finding["line"] for finding in found["findings"] if "is slow" in finding["line"]]
        assert slow.startswith("the link of host-3 (rank 2) is slow: ")
