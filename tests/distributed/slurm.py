"""A small slurm on this machine: two nodes, each a slurmd, with a slurmctld and a munged, in a folder of their own.

Both nodes are this machine: `host1` and `host2`, names that only slurm knows. Nothing of it survives the body of
`with`, and a slurm that the machine has itself is not touched: ports, sockets and configuration are others.
"""

import os
import secrets
import shutil
import socket
import subprocess
import time
from contextlib import suppress

import psutil

_TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo")
_PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
REQUEUE_S = 5
"""Life of a job's credential. slurm waits for its end, by default 120 s, before a requeued job may begin again."""

_CONFIGURATION = """
ClusterName=small
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_s}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=10
ReturnToService=2
KillWait={kill_wait_s}
NodeName=host[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{ports[1]},{ports[2]}] CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
"""


def why_no_slurm():
    """Why there can be no slurm here, in a few words; None: there can be one."""
    missing = [name for name in _TOOLS if shutil.which(name, path=_PATH) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return "slurmd needs root" if os.geteuid() != 0 else None


class Slurm:
    """The cluster, a context manager.

    Args:
        folder: an empty one, for its files.
        kill_wait_s: seconds from SIGTERM to SIGKILL, 30 by slurm's default.
    """

    def __init__(self, folder, kill_wait_s=30):
        self._folder, self._daemons = folder, []
        self._conf = folder / "slurm.conf"
        ports = _free_ports(3)
        self._conf.write_text(
            _CONFIGURATION.format(folder=folder, ports=ports, requeue_s=REQUEUE_S, kill_wait_s=kill_wait_s)
        )
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        self.environment = os.environ | {"SLURM_CONF": str(self._conf), "PATH": _PATH}

    def __enter__(self):
        munge = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        options = [f"--{name}={self._folder / file}" for name, file in munge.items()]
        try:
            self._start("munged", "--foreground", "--force", f"--seed-file={self._folder / 'munged.seed'}", *options)
            self._wait_for(lambda: (self._folder / "munge.socket").exists(), 30)
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D", "-N", "host1")
            self._start("slurmd", "-D", "-N", "host2")
            self._wait_for(lambda: self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split() == ["idle"] * 2, 60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self._daemons:
            with suppress(subprocess.TimeoutExpired):
                self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False, timeout_s=10)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        for daemon in self._daemons:
            daemon.wait()

    def processes(self):
        """Daemons, steps and ranks that live."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == str(self._conf) and process.pid != os.getpid():
                    found.append(process)
        return found

    def run(self, *command, check=True, timeout_s=60, **options):
        """Run a command of slurm; returns what it prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout_s, check=False, **options
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, *words, variables=None, cwd=None):
        """Submit a script; returns the number of the job.

        Args:
            words: options of sbatch, the script, its arguments.
            variables: added to the job's environment.
            cwd: where sbatch is called.
        """
        more = {**self.environment, **(variables or {})}
        done = subprocess.run(
            ["sbatch", "--parsable", *map(str, words)], env=more, cwd=cwd, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout.strip()

    def job(self, number):
        """What `scontrol show job` says: names and values."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.partition("=")[::2] for word in words)

    def wait(self, number, *states, restarts=0, timeout_s=180.0):
        """Wait until a job is in one of some states, after at least so many restarts; returns what `job` does."""

        def reached():
            job = self.job(number)
            return job if job["JobState"] in states and int(job["Restarts"]) >= restarts else None

        return self._wait_for(reached, timeout_s)

    def _start(self, name, *options):
        with (self._folder / f"{name}.out").open("ab") as output:
            command = [shutil.which(name, path=_PATH), *options]
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=output, stderr=output))

    def _wait_for(self, condition, timeout_s):
        until = time.monotonic() + timeout_s
        while not (found := condition()):
            dead = [daemon.args[0] for daemon in self._daemons if daemon.poll() is not None]
            if dead or time.monotonic() > until:
                logs = "".join(file.read_text()[-1500:] for file in sorted(self._folder.glob("*.out")))
                raise RuntimeError(f"{dead or 'not in time'}: {logs}")
            time.sleep(0.1)
        return found


def _free_ports(count):
    with_port = [socket.socket() for _ in range(count)]
    for probe in with_port:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in with_port]
    for probe in with_port:
        probe.close()
    return ports
