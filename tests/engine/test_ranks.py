"""What ranks send each other, on real processes: three of them, so that one has no peer. What they must not send."""

import pytest
import torch
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from maskmatch_scale.engine.launchers import Place
from maskmatch_scale.engine.ranks import Runtime, Transfers
from maskmatch_scale.engine.watch import _last_collective
from maskmatch_scale.training import preflight
from tests.spawned import answers_of

RANKS = 3


def on_a_rank(rank, port, found):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    runtime = Runtime(Place(rank, rank, RANKS, RANKS), torch.device("cpu"), 1)
    runtime.sum_over_ranks(torch.ones(3))
    for dtype in (torch.float32, torch.int64, torch.bool):
        first, last = (torch.tensor([[value, value % 2]]).to(dtype) for value in (10 * rank + 1, 10 * rank + 2))
        found.put((rank, str(dtype), runtime.of_neighbour(first, last).tolist()))
    last = _last_collective("cpu")
    dist.barrier()
    # Ranks are compared by these numbers. gloo counts sends and receives too, and the ranks have made unequal many.
    found.put((rank, "called", runtime.collectives_called()))
    found.put((rank, "last", last))
    dist.barrier()
    dist.destroy_process_group()


def test_of_neighbour():
    answers = {(rank, dtype): values for rank, dtype, values in answers_of(on_a_rank, RANKS)}
    # 0 gets the first of 1, 1 the last of 0, and 2 stands alone: the first of 0.
    assert {rank: answers[rank, "torch.int64"] for rank in range(3)} == {0: [[11, 1]], 1: [[2, 0]], 2: [[1, 1]]}
    assert answers[1, "torch.bool"] == [[True, False]]
    assert answers[2, "torch.float32"] == [[1.0, 1.0]]
    assert answers[0, "called"] == answers[1, "called"] == answers[2, "called"]
    assert sum(answers[0, "called"].values()) == 2
    assert {answers[rank, "last"] for rank in range(3)} == {"all_reduce [[3]]"}


@pytest.mark.parametrize("counted", [0, 1, 2])
def test_whatever_a_backend_counts_of_a_batch_is_no_collective(monkeypatch, counted):
    """NCCL has counted a batch of transfers as none or as one collective, by its version; gloo counts each."""

    class Group:
        number = 7

        def _get_sequence_number_for_group(self):
            return self.number

        def size(self):
            return 2

    group = Group()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", lambda: group)
    monkeypatch.setattr(dist.distributed_c10d._world, "default_pg", group)
    monkeypatch.setitem(dist.distributed_c10d._world.pg_names, group, "all")
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda _: setattr(group, "number", 7 + counted) or [])
    runtime = Runtime(Place(0, 0, 2, 2), torch.device("cpu"), 1, transfers=Transfers())
    runtime._transfer([None, None])
    assert runtime.collectives_called() == {"all": 7}


def pretended_gpu_rank():
    """Rank 0 of two on a GPU that is not there; what it sends goes nowhere."""
    return Runtime(Place(0, 0, 2, 2), torch.device("cuda", 0), 1)


def test_a_tensor_on_the_host_is_refused_where_ranks_have_gpus(monkeypatch):
    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: sent.append(tensor.device.type))
    runtime = pretended_gpu_rank()
    with pytest.raises(RuntimeError, match="a tensor on cpu in a collective of ranks on cuda:0"):
        runtime.sum_over_ranks(torch.ones(3))
    with pytest.raises(RuntimeError, match="a tensor on cpu"):
        runtime.of_neighbour(torch.ones(3), torch.ones(3))
    assert not sent


def test_class_pixels_are_summed_on_the_device(make_recipe, monkeypatch):
    """With NCCL alone a sum of CPU tensors raises; before, every job on two GPUs ended so."""
    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: sent.append(tensor.device.type))

    class Batches:
        @staticmethod
        def count_class_pixels(sum_over_ranks):
            with FakeTensorMode(allow_non_fake_inputs=True):
                counts = sum_over_ranks(torch.ones(3, dtype=torch.int64))
                assert counts.device.type == "cpu"

    recipe = make_recipe(method={"class_weights": "inverse_sqrt"})
    preflight.count_class_pixels(pretended_gpu_rank(), recipe, Batches())
    assert sent == ["cuda"]
