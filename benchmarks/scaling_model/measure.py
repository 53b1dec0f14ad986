"""What one machine can show of the model: ranks 1, 2 and 4, ZeRO 1 to 3, over a loopback of a given bandwidth.

Every run has a network namespace of its own, whose loopback is as slow as `tc` makes it and counts the bytes of these
ranks alone. It needs root. All ranks share the loopback and the cores, so that N ranks are N hosts on one slow network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import ROOT, say
from benchmarks.scaling_model.cases import STAGES
from maskmatch_scale.data.writing import write_shards
from maskmatch_scale.planning.communication import seconds, step_traffic
from maskmatch_scale.planning.hardware import gpu_named
from maskmatch_scale.planning.setting import Cluster, Link
from maskmatch_scale.planning.subject import Subject
from maskmatch_scale.recipe import Recipe, parse_recipe
from tests.conftest import ShapesSource

RANKS = (1, 2, 4)
LINKS_MBIT = (None, 1000, 200)
"""10⁶ bit/s of the loopback; None: as fast as the machine makes it."""
STEPS, LEFT_OUT = 8, 3
LATENCY_S = 5e-5
"""Of a message of gloo over a loopback. An assumption; of large messages it is a small part."""


def reason_not() -> str | None:
    """Why nothing can be measured here; None: it can."""
    for tool in ("unshare", "ip", "tc"):
        if shutil.which(tool) is None:
            return f"no {tool} here"
    if os.geteuid() != 0:
        return "namespaces need root"
    return None


def recipe_of(folder: Path, stage: int, run: str) -> Recipe:
    """A small ViT in fp32, so that the smallest link takes seconds a step."""
    return parse_recipe(
        {
            "data": {"root": str(folder / "data"), "crop_px": 64, "workers": 0},
            "model": {
                "backbone": "timm/vit_tiny_patch16_224",
                "backbone_options": {"embed_dim": 96, "depth": 6, "num_heads": 3},
            },
            "method": {"scales": [1.0], "strong_view": {"cutmix_probability": 0.0}},
            "engine": {"zero_stage": stage, "precision": "fp32", "micro_batch": 2, "threads": 1},
            "run": {"dir": str(folder / run), "steps": STEPS, "checkpoint_every": 0, "log_every": 100, "keep_best": 0},
        }
    )


def measure(folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each number of ranks, link and stage: seconds and bytes of a step, medians over steps of rank 0.

    Args:
        folder: for data and runs; runs that are there are not repeated.
    """
    write_shards(ShapesSource({"labelled": 16, "unlabelled": 32}), folder / "data", workers=1, progress=False)
    for stage in STAGES:
        for ranks in RANKS:
            for link in LINKS_MBIT if ranks > 1 else (None,):
                run = f"{ranks}-{stage}-{link}"
                path = folder / f"{run}.yaml"
                path.write_text(recipe_of(folder, stage, run).to_yaml(), encoding="utf-8")
                steps_file = folder / run / "steps-0.json"
                if not steps_file.is_file():
                    _launch(path, ranks, link)
                noted = json.loads(steps_file.read_text(encoding="ascii"))[LEFT_OUT:]
                steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(noted)]
                step_s = median(s for s, _ in steps)
                say(f"scaling_model: {ranks} ranks, ZeRO-{stage}, {link or 'any'} Mbit/s: {step_s:.2f} s a step")
                yield {
                    "ranks": ranks,
                    "zero_stage": stage,
                    "link_mbit": link,
                    "step_s": step_s,
                    "least_s": min(s for s, _ in steps),
                    "sent_mb": median(b for _, b in steps) / 1e6,
                }


def _launch(recipe: Path, ranks: int, link: int | None) -> None:
    """Run it to its end.

    Raises:
        RuntimeError: it failed; has the end of its output.
    """
    shape = f"tc qdisc add dev lo root tbf rate {link}mbit burst 256kb latency 1000ms && " if link else ""
    torchrun = (
        f"{sys.executable} -m torch.distributed.run --nproc_per_node {ranks} --master_addr 127.0.0.1 "
        f"--master_port 29511 --module benchmarks.scaling_model.rank {recipe}"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(
        ["unshare", "--net", "sh", "-c", f"ip link set lo up && {shape}exec {torchrun}"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    if ended.returncode:
        raise RuntimeError(f"{' '.join(ended.args)}:\n{ended.stdout[-3000:]}")


def compare(rows: list[dict[str, Any]], subjects: dict[int, Subject]) -> list[dict[str, Any]]:
    """What the model says of each shaped link: bytes, and the step on a slower link from the step on the fastest.

    Args:
        rows: of :func:`measure`.
        subjects: by stage, of :func:`recipe_of`.
    """
    shaped = [row for row in rows if row["link_mbit"] is not None]
    found = []
    for row in shaped:
        ranks, stage = row["ranks"], row["zero_stage"]
        alike = [other for other in shaped if (other["ranks"], other["zero_stage"]) == (ranks, stage)]
        fastest = max(alike, key=lambda other: other["link_mbit"])
        traffic = step_traffic(subjects[stage], ranks)
        sent = ranks * sum(one.sent(ranks) for one in traffic) / 1e6
        added = sum(seconds(one, _shared(row)) - seconds(one, _shared(fastest)) for one in traffic)
        step_s = fastest["step_s"] + added
        is_reference = row is fastest
        found.append(
            {
                "ranks": ranks,
                "zero_stage": stage,
                "link_mbit": row["link_mbit"],
                "sent_mb": row["sent_mb"],
                "predicted_sent_mb": sent,
                "bytes_error": sent / row["sent_mb"] - 1,
                "step_s": row["step_s"],
                "predicted_step_s": None if is_reference else step_s,
                "step_error": None if is_reference else step_s / row["step_s"] - 1,
            }
        )
    return found


def _shared(row: dict[str, Any]) -> Cluster:
    """A cluster whose hosts, one for each rank, share one link."""
    each = Link("loopback", row["link_mbit"] * 1e6 / 8 / row["ranks"], LATENCY_S, "tc")
    return Cluster(row["ranks"], 1, gpu_named("h100"), each, each, 1, 1)
