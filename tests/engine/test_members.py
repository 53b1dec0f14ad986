"""What the ranks tell each other when they have joined, and what is refused then."""

import dataclasses
import json

import pytest
import torch
from torch import distributed as dist

from maskmatch_scale.engine.members import Member, meet, shared_gpu
from maskmatch_scale.engine.processes import Process
from maskmatch_scale.errors import UserError


def on_gpu(host, gpu):
    return Member(host, Process(1, host), gpu)


def test_ranks_that_share_a_gpu_are_named():
    members = [on_gpu("a", "GPU-1"), on_gpu("a", "GPU-2"), on_gpu("b", "GPU-3"), on_gpu("b", "GPU-3")]
    found = shared_gpu(members)
    assert found.startswith("ranks 2 and 3 on b have the same GPU, GPU-3; start one rank for each GPU")
    assert shared_gpu([on_gpu("a", "GPU-1")] * 3).startswith("ranks 0, 1 and 2 on a have the same GPU, GPU-1; ")


def test_ranks_with_gpus_of_their_own_or_none_are_fine():
    assert shared_gpu([on_gpu("a", "GPU-1"), on_gpu("a", "GPU-2"), on_gpu("b", "GPU-3")]) is None
    assert shared_gpu([on_gpu("a", None), on_gpu("a", None)]) is None


def test_a_member_is_told_as_json():
    own = Member.here(torch.device("cpu"))
    assert own.gpu is None
    assert Member.from_json(json.dumps(dataclasses.asdict(own))) == own


def test_every_rank_reads_what_the_others_are_before_rank_0_leaves():
    store = dist.HashStore()
    other = on_gpu("a", "GPU-1")
    store.set("member/1", json.dumps(dataclasses.asdict(other)))
    own = on_gpu("a", "GPU-2")
    assert meet(store, 0, 2, own) == (own, other)
    store.set("read/1", "")
    with pytest.raises(UserError, match="ranks 0 and 1 on a have the same GPU, GPU-1") as caught:
        meet(store, 0, 2, other)
    assert caught.value.on_all_ranks
    assert store.check(["read/0"])
