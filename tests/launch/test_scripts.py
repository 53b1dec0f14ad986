"""The scripts of launch/: what they print, the commands that they would start, and what they refuse."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from deepspeed.launcher import runner
from torch.distributed import run as torchrun

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = ("deepspeed.sh", "torchrun.sh", "accelerate.sh", "slurm.sh")
OWN = re.compile("RANK|MASTER|NODE|SLURM|OMP_|HOSTFILE|LAUNCH|LOCAL|JOB_|WORLD|DS_|MAX_RESTARTS")


@pytest.fixture
def call(tmp_path):
    """Call a script in a folder with a recipe `mine.yaml`; returns code, what it prints, and what it says on stderr."""
    (tmp_path / "mine.yaml").touch()
    clean = {name: value for name, value in os.environ.items() if not OWN.match(name)}
    clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"

    def call(script, *arguments, **variables):
        done = subprocess.run(
            [LAUNCH / script, *arguments],
            env=clean | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.fixture
def words_of(call):
    """The words of the command that a script would start."""

    def words_of(script, *arguments, **variables):
        code, printed, said = call(script, "--dry-run", *arguments, **variables)
        assert code == 0, said
        return shlex.split(printed)

    return words_of


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert len(scripts) >= 6
    done = subprocess.run(
        ["shellcheck", "-x", "-P", "SCRIPTDIR", *scripts], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_arguments_a_script_says_which_variables_it_has(call, script):
    for arguments in ((), ("--dry-run",)):
        code, printed, said = call(script, *arguments)
        assert (code, printed) == (2, "")
        assert said.startswith("usage: ")
        assert "RECIPE" in said.splitlines()[0]
    shown = re.findall(r'^ *\(?(?:start|shown=)\s*[\'"]([A-Z_ ]+)[\'"]', (LAUNCH / script).read_text(), re.MULTILINE)
    assert shown
    for name in shown[0].split():
        if not (script == "slurm.sh" and name in ("NNODES", "HOSTFILE")):  # sbatch's own, and made by the script
            assert f"\n  {name} " in said, name


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("recipe", "variables", "line"),
    [
        ("none.yaml", {}, "none.yaml: no such recipe; the first argument is a recipe's file, key=value comes after it"),
        ("mine.yaml", {"RANKS": "two"}, "RANKS=two: not a whole number above 0"),
        ("mine.yaml", {"RANKS": "0"}, "RANKS=0: not a whole number above 0"),
        ("mine.yaml", {"RANKS": "2", "OMP_NUM_THREADS": "-1"}, "OMP_NUM_THREADS=-1: not a whole number above 0"),
    ],
)
def test_a_mistake_is_one_line(call, script, recipe, variables, line):
    if script == "slurm.sh":
        variables = variables | {"SLURM_JOB_ID": "1", "LAUNCH_FOLDER": str(LAUNCH)}
    assert call(script, recipe, **variables) == (2, "", f"launch/{script}: {line}\n")


@pytest.mark.parametrize(
    ("script", "variables", "line"),
    [
        ("torchrun.sh", {"NNODES": "2"}, "NNODES=2, but MASTER_ADDR is not set: the address of the first machine"),
        ("torchrun.sh", {"NNODES": "1:2"}, "NNODES=1:2, but MASTER_ADDR is not set: the address of the first machine"),
        ("torchrun.sh", {"NNODES": "two"}, "NNODES=two: neither a number of machines nor MIN:MAX"),
        ("torchrun.sh", {"NNODES": "4:2", "MASTER_ADDR": "a"}, "NNODES=4:2: MIN is above MAX"),
        ("torchrun.sh", {"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "2"},
         "NODE_RANK=2: the last of NNODES=2 machines is 1"),
        ("torchrun.sh", {"MASTER_PORT": "http"}, "MASTER_PORT=http: not a whole number above 0"),
        ("accelerate.sh", {"NNODES": "2"}, "NNODES=2, but MASTER_ADDR is not set: the address of the first machine"),
        ("accelerate.sh", {"NNODES": "2", "MASTER_ADDR": "a", "NODE_RANK": "x"}, "NODE_RANK=x: not a whole number"),
        ("slurm.sh", {}, "this is not a slurm job: sbatch --nodes=2 launch/slurm.sh mine.yaml"),
        ("slurm.sh", {"SLURM_JOB_ID": "1", "LAUNCHER": "mpi", "LAUNCH_FOLDER": str(LAUNCH), "MASTER_ADDR": "a"},
         "LAUNCHER=mpi: srun, torchrun, accelerate or deepspeed"),
        ("slurm.sh", {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": "/nowhere"},
         "/nowhere/launch/common.sh is not there: call sbatch in the repository, or set LAUNCH_FOLDER"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line(call, script, variables, line):
    code, printed, said = call(script, "mine.yaml", **{"RANKS": "2"} | variables)
    assert (code, printed, said.splitlines()[-1]) == (2, "", f"launch/{script}: {line}")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "no such file; write a line `HOST slots=RANKS` for each host"),
        ("# hosts\n\n", "no host; write a line `HOST slots=RANKS` for each"),
        ("gpu1 slots=8\ngpu2 slot=8\n", 'line 2: "gpu2 slot=8" is not `HOST slots=RANKS`'),
        ("gpu1 slots=0\n", 'line 1: "gpu1 slots=0" is not `HOST slots=RANKS`'),
        ("gpu1 slots=8\n# twice\ngpu1 slots=4\n", "line 3: gpu1 is there already; name each host once"),
    ],
)
def test_a_hostfile_that_is_wrong_is_one_line(call, tmp_path, content, line):
    if content is not None:
        (tmp_path / "hosts").write_text(content)
    code, printed, said = call("deepspeed.sh", "mine.yaml", HOSTFILE="hosts")
    assert (code, printed, said) == (2, "", f"launch/deepspeed.sh: HOSTFILE=hosts: {line}\n")


def after(words, name):
    return words[words.index(name) + 1 :]


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")
def test_deepspeed_takes_the_hostfile(words_of, tmp_path):
    (tmp_path / "hosts").write_text("gpu1 slots=2\n  gpu2\tslots=4 \n")
    words = words_of(
        "deepspeed.sh", "mine.yaml", "a=[1.0]", "b=x > $3", HOSTFILE="hosts", MASTER_ADDR="10.0.0.1", MASTER_PORT="1234"
    )
    assert words[2:4] == ["--hosts", "gpu1,gpu2"]
    arguments = runner.parse_args(after(words, "deepspeed"))
    assert runner.fetch_hostfile(tmp_path / arguments.hostfile) == {"gpu1": 2, "gpu2": 4}
    assert (arguments.master_addr, arguments.master_port, arguments.user_script) == (
        "10.0.0.1",
        1234,
        "maskmatch_scale",
    )
    assert arguments.module
    assert arguments.force_multi
    # What the shell of a host makes of them, after deepspeed has put quotes around those with spaces.
    seen = runner.PDSHRunner(arguments, "").parse_user_args()
    shell = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {' '.join(seen)}"], capture_output=True, text=True, check=True
    )
    assert shell.stdout.splitlines() == ["train", "mine.yaml", "a=[1.0]", "b=x > $3"]


@pytest.fixture
def tools(tmp_path):
    """Put a command of a name and content before all others: a function, which returns the PATH."""

    def tool(name, content):
        file = tmp_path / "tools" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{content}\n")
        file.chmod(0o755)
        return f"{file.parent}{os.pathsep}{os.environ['PATH']}"

    return tool


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh is not installed")
@pytest.mark.parametrize("own", [None, "", "-p 2222"])
def test_ssh_asks_whether_a_host_lives_unless_its_options_are_set(call, tmp_path, tools, own):
    (tmp_path / "hosts").write_text("gpu1 slots=2\n")
    path = tools("python", '[ "$1" = -c ] && echo 0 || echo "$PDSH_SSH_ARGS_APPEND"')
    options = {} if own is None else {"PDSH_SSH_ARGS_APPEND": own}
    code, printed, said = call("deepspeed.sh", "mine.yaml", HOSTFILE="hosts", PATH=path, **options)
    expected = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4" if own is None else own
    assert (code, printed) == (0, f"{expected}\n")
    assert (f"PDSH_SSH_ARGS_APPEND={expected}\n" in said) == bool(expected)


@pytest.mark.parametrize("script", SCRIPTS[:3])
def test_a_script_without_those_beside_it_starts_nothing(tmp_path, script):
    copy = shutil.copy(LAUNCH / script, tmp_path)
    done = subprocess.run([copy, "mine.yaml"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "common.sh: No such file" in done.stderr


@pytest.mark.parametrize(("restarts", "seconds", "queued"), [("2", 0, True), ("3", 0, False), ("3", 100, True)])
def test_a_job_that_slurm_stops_at_each_start_is_not_queued_for_ever(call, tmp_path, tools, restarts, seconds, queued):
    path = tools("srun", "exit 75")
    tools("scontrol", f'echo "$@" >>{tmp_path}/asked')
    (tmp_path / "began").write_text(f"SECONDS={seconds}\n")  # how long the script has run
    given = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarts, "LAUNCH_FOLDER": str(LAUNCH), "PATH": path}
    code, _, said = call("slurm.sh", "mine.yaml", BASH_ENV=str(tmp_path / "began"), **given)
    assert code == 75
    assert (tmp_path / "asked").exists() == queued
    assert ("is queued again" if queued else "job 7 is not queued again: look at its time limit") in said


def test_a_job_of_slurm_leaves_the_hostfile_of_the_caller(call, tmp_path, tools):
    (tmp_path / "hosts").write_text("gpu1 slots=8\n")
    given = {"SLURM_JOB_ID": "7", "LAUNCH_FOLDER": str(LAUNCH), "PATH": tools("srun", "exit 0"), "RANKS": "1"}
    code, _, said = call("slurm.sh", "mine.yaml", HOSTFILE=str(tmp_path / "hosts"), **given)
    assert (code, (tmp_path / "hosts").exists()) == (0, True)
    assert "HOSTFILE" not in said


def test_torchrun_on_machines_that_are_known(words_of):
    several = {"NNODES": "3", "RANKS": "4", "MASTER_ADDR": "gpu1"}
    words = words_of("torchrun.sh", "mine.yaml", "--resume", "auto", **several, SLURM_NODEID="2")
    arguments = torchrun.parse_args(after(words, "torchrun"))
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("3", "4", 2)
    assert (arguments.master_addr, arguments.master_port, arguments.max_restarts) == ("gpu1", 29500, 0)
    assert arguments.training_script_args == ["train", "mine.yaml", "--resume", "auto"]
    alone = torchrun.parse_args(after(words_of("torchrun.sh", "mine.yaml", RANKS="2", SLURM_NODEID="2"), "torchrun"))
    assert (alone.nnodes, alone.node_rank, alone.master_addr) == ("1", 0, "127.0.0.1")


def test_torchrun_on_machines_that_come_and_go(words_of):
    words = words_of("torchrun.sh", "mine.yaml", NNODES="1:4", RANKS="4", MASTER_ADDR="gpu1", JOB_ID="seven")
    arguments = torchrun.parse_args(after(words, "torchrun"))
    assert torchrun.parse_min_max_nnodes(arguments.nnodes) == (1, 4)
    assert (arguments.rdzv_backend, arguments.rdzv_endpoint, arguments.rdzv_id) == ("c10d", "gpu1:29500", "seven")
    assert arguments.max_restarts == 3


def test_accelerate_on_several_machines(words_of):
    several = {"NNODES": "2", "RANKS": "4", "MASTER_ADDR": "gpu1", "NODE_RANK": "1"}
    words = words_of("accelerate.sh", "mine.yaml", "run.steps=3", **several)
    arguments = launch_command_parser().parse_args(after(words, "launch"))
    assert (arguments.num_processes, arguments.num_machines, arguments.machine_rank) == (8, 2, 1)
    assert (arguments.main_process_ip, arguments.main_process_port) == ("gpu1", 29500)
    assert arguments.training_script_args == [
        "train", "mine.yaml", "engine.library=accelerate", "engine.zero_stage=0", "run.steps=3",
    ]  # fmt: skip


@pytest.mark.parametrize("launcher", ["srun", "torchrun", "accelerate", "deepspeed"])
def test_slurm_goes_on_from_the_newest_checkpoint(words_of, tmp_path, launcher):
    words = words_of("slurm.sh", "mine.yaml", "run.steps=3", RANKS="4", SLURM_CPUS_ON_NODE="8", LAUNCHER=launcher)
    assert words[0] == "srun"
    assert words[-4:] == ["mine.yaml", "run.steps=3", "--resume", "auto"]
    tasks = ["--ntasks-per-node", "4", "--cpus-per-task", "2"] if launcher == "srun" else []
    assert tasks == (words[4:8] if tasks else [])
    assert (f"{LAUNCH}/{launcher}.sh" in words) == (launcher != "srun")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]
