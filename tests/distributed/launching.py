"""Starting a real launcher, and reading what its runs leave."""

import json
import os
import subprocess
import sys
from pathlib import Path

from maskmatch_scale.engine.setup import _free_port

BIN = Path(sys.executable).parent


def environment(*, on_gpu=False, **more):
    """Of a launched process: the environment's own commands first, one thread a rank."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    accelerator = {} if on_gpu else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | accelerator | {"OMP_NUM_THREADS": "1", "PATH": path} | more


def deepspeed_command(*arguments, ranks=2, on_gpu=False):
    """`deepspeed` on ranks of the CPU, or of GPUs."""
    return [
        str(BIN / "deepspeed"), "--num_gpus" if on_gpu else "--num_accelerators", str(ranks), "--no_local_rank",
        "--master_port", str(_free_port()), *map(str, arguments),
    ]  # fmt: skip


def deepspeed(*arguments, timeout_s=900):
    """Run `deepspeed` on two CPU ranks; returns the finished process."""
    command = deepspeed_command(*arguments)
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout_s, check=False)


def launch(jobs, folder):
    """Train recipes on two ranks, one after the other (`train_recipes.py`); returns the finished process."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    return deepspeed(Path(__file__).with_name("train_recipes.py"), file)


def records(run, kind="train"):
    """A run's records of one kind."""
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == kind]
