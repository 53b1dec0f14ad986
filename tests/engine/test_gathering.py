"""What is gathered, when, and how long it is kept; one rank whose collectives are counted, no process group.

On two ranks, with DeepSpeed's shards and bytes counted: tests/distributed/test_sharded_teacher.py.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from maskmatch_scale.engine import gathering
from maskmatch_scale.engine.gathering import Bucket, Gathering, Shard

CPU = torch.device("cpu")


class Net(nn.Module):
    """Four layers in turn; the weight of the last one is read outside its own forward."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))

    def forward(self, x):
        for layer in self.layers[:3]:
            x = layer(x)
        return x @ self.layers[3].weight.T


@pytest.fixture
def begun(monkeypatch):
    """The storage sizes that were sent, in bytes, in their order; collectives of a single rank."""
    sent = []

    def all_gather(parts, own, group, async_op=False):
        sent.append(own.numel() * own.element_size())
        parts.copy_(own)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(gathering.dist, "all_gather_into_tensor", all_gather)
    monkeypatch.setattr(gathering.dist, "get_world_size", lambda group: 1)
    monkeypatch.setattr(gathering.dist, "get_rank", lambda group: 0)
    return sent


def gathered(net, max_live, dtype=torch.float32, device=CPU):
    """A bucket a layer, 16 elements each, filled from the layer's weight."""
    buckets = []
    for layer in net.layers:
        weight = layer.weight
        like = SimpleNamespace(
            ds_shape=weight.shape, ds_process_group=None, ds_tensor=SimpleNamespace(ds_numel=weight.numel())
        )
        shard = Shard(like)
        buckets.append((Bucket([shard], dtype, device, offloaded=False), [weight]))
        shard.put(weight)
        weight.data = torch.empty(0, device=device)
    return Gathering(net, buckets, max_live), [bucket for bucket, _ in buckets]


@torch.no_grad()
def test_a_forward_reads_whole_weights_wherever_it_reads_them(begun):
    net, x = Net(), torch.randn(2, 4)
    expected = net(x)
    held, _ = gathered(net, max_live=1000)
    with held.forward():
        assert net(x).equal(expected)
    assert net.layers[0].weight.numel() == 0  # outside: the empty parameter
    assert [name for name, _ in net.named_parameters()] == [f"layers.{i}.weight" for i in range(4)]
    assert begun == [64] * 4


@torch.no_grad()
def test_each_is_gathered_once_while_kept_and_anew_afterwards(begun):
    net, x = Net(), torch.randn(2, 4)
    held, buckets = gathered(net, max_live=1000)
    with held.kept():
        for _ in range(3):
            with held.forward():
                before = net(x)
    assert len(begun) == 4
    assert not any(bucket.wholes for bucket in buckets)
    buckets[0]._values.mul_(2)
    with held.forward():
        assert net(x).equal(2 * before)
    assert len(begun) == 8


@torch.no_grad()
@pytest.mark.parametrize(("max_live", "sent"), [(64, 4), (63, 4 + 2 * 4), (0, 12)])
def test_beyond_the_bound_the_first_are_kept(begun, max_live, sent):
    net, x = Net(), torch.randn(2, 4)
    held, buckets = gathered(net, max_live)
    most = 0
    with held.kept():
        for _ in range(3):
            with held.forward():
                net(x)
            most = max(most, sum(bool(bucket.wholes) or bucket._coming is not None for bucket in buckets))
    assert len(begun) == sent
    assert most <= max(3, max_live // 16)


@torch.no_grad()
def test_with_room_for_one_more_than_are_in_use_the_first_one_stays(begun):
    net, x = Net(), torch.randn(2, 4)
    net.layers.extend(nn.Linear(4, 4, bias=False) for _ in range(2))
    net.forward = lambda x: [x @ layer.weight for layer in net.layers][-1]
    held, _ = gathered(net, max_live=4 * 16)
    with held.kept():
        for _ in range(3):
            with held.forward():
                net.forward(x)
    assert len(begun) == 1 + 3 * 5


@torch.no_grad()
def test_the_next_one_is_under_way_while_one_is_read(begun):
    net = Net()
    held, _ = gathered(net, max_live=1000)
    with held.forward():
        net(torch.randn(2, 4))  # the order is not known before
    del begun[:]
    with held.forward():
        for number, expected in enumerate((2, 3, 4, 4)):
            _ = net.layers[number].weight
            assert len(begun) == expected


def test_on_a_pretended_gpu_nothing_waits_and_16_bits_are_sent(begun):
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        net = Net()
        held, _ = gathered(net, 1000, torch.bfloat16, torch.device("cuda"))
        with held.forward():
            out = net(torch.empty(2, 4, device="cuda", dtype=torch.bfloat16))
    assert out.device.type == "cuda"
    assert begun == [32] * 4
