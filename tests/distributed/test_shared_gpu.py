"""Two ranks on one GPU, a pretended one, are refused at the start: NCCL would fail later, in its own words."""

import socket
import subprocess
import sys

import pytest

from maskmatch_scale.engine.setup import _free_port
from tests.distributed.launching import environment

pytestmark = pytest.mark.distributed

SHARING = """
from maskmatch_scale.cli import main as cli
from maskmatch_scale.engine import members
members.gpu_uuid = lambda device: "GPU-0b1c"
cli.main()
"""


def test_two_ranks_on_one_gpu_are_refused_on_both(make_recipe, tmp_path):
    (tmp_path / "sharing.py").write_text(SHARING)
    (tmp_path / "recipe.yaml").write_text(make_recipe().to_yaml())
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "sharing.py"), "train", str(tmp_path / "recipe.yaml")],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **job),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    shown = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], "\n".join(shown)
    lines = [line for each in shown for line in each.splitlines() if "maskmatch: error" in line]
    assert len(lines) == 1
    assert f"ranks 0 and 1 on {socket.gethostname()} have the same GPU, GPU-0b1c; start one rank" in lines[0]
    assert not (tmp_path / "run").exists()
