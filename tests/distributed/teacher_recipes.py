"""Started by a launcher: train recipes at ZeRO-3, and compare the sharded teacher with a whole one of the same weights.

Rank 0 writes, for every recipe, what its teacher sent and whether its pseudo-labels are those of the whole one.
"""

import json
import os
import sys
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskmatch_scale.engine.precision import autocast, autocast_dtype
from maskmatch_scale.method.pseudo_labels import multi_scale_pseudo_labels
from maskmatch_scale.recipe import parse_recipe
from maskmatch_scale.runs.model import build_student
from maskmatch_scale.train import train
from maskmatch_scale.training.callbacks import Callback, closing
from tests.distributed.reference import probe_images
from tests.engine.state import Stored, apart

closing.write_report = lambda runs: "left out"


class Sent(TorchDispatchMode):
    """Bytes that this rank gives to collectives in the body, one number for each of them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "c10d":
            assert "allgather" in function.__name__, function  # (output, input, …)
            own = arguments[1] if isinstance(arguments[1], torch.Tensor) else arguments[1][0]
            self.calls.append(own.numel() * own.element_size())
        return function(*arguments, **(keywords or {}))


def _of_all_ranks(teacher):
    gathered = [None] * int(os.environ["WORLD_SIZE"])
    torch.distributed.all_gather_object(gathered, list(teacher.pieces()))
    return [piece for pieces in gathered for piece in pieces]


class Compare(Callback):
    """After training: all scales within one `gathered`, counted; then the same by a whole teacher."""

    results: ClassVar = []

    def finished(self):
        run, scales = self.run, self.run.recipe.method.scales
        images = probe_images()
        with torch.no_grad(), Sent() as sent, run.teacher.gathered():
            labels, confidence = multi_scale_pseudo_labels(run.teacher, images, scales)
            live = sum(b.numel for b in run.teacher._gathering._kept)
        with Sent() as alone:
            logits = run.teacher(images)
        there = [bool(b.wholes) for b in run.teacher._gathering._order]
        stored = Stored(_of_all_ranks(run.teacher))
        whole = build_student(run.recipe, run.data).eval()
        whole.load_state_dict({name.removeprefix("ema/"): value for name, value in stored.whole.items()})
        for shard in run.teacher._shards.values():
            shard.values.zero_()
        run.teacher.restore(stored)
        again = Stored(_of_all_ranks(run.teacher))
        with torch.no_grad(), autocast(images.device, autocast_dtype(run.recipe)):
            labels_whole, confidence_whole = multi_scale_pseudo_labels(whole, images, scales)
            logits_whole = whole(images)
        self.results.append(
            {
                "sent": sent.calls,
                "sent_alone": alone.calls,
                "kept": live,
                "there_after": any(there),
                "labels": labels.equal(labels_whole),
                "confidence": confidence.equal(confidence_whole),
                "logits": logits.equal(logits_whole),
                "state": not apart(again.whole, stored.whole),
                "sizes": {name: list(value.shape) for name, value in whole.named_parameters()},
            }
        )


for job in json.loads(Path(sys.argv[1]).read_text()):
    train(parse_recipe(job), callbacks=[Compare])
if os.environ["RANK"] == "0":
    Path(sys.argv[2]).write_text(json.dumps(Compare.results))
