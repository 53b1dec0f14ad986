"""What ranks send each other, on real processes: three of them, so that one has no peer."""

import socket

import torch
from torch import distributed as dist
from torch import multiprocessing

from maskmatch_scale.engine.ranks import Place, Runtime

RANKS = 3


def on_a_rank(rank, port, found):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    runtime = Runtime(Place(rank, rank, RANKS, RANKS), torch.device("cpu"), 1)
    for dtype in (torch.float32, torch.int64, torch.bool):
        first, last = (torch.tensor([[value, value % 2]]).to(dtype) for value in (10 * rank + 1, 10 * rank + 2))
        found.put((rank, str(dtype), runtime.of_neighbour(first, last).tolist()))
    dist.barrier()
    dist.destroy_process_group()


def test_of_neighbour():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    multiprocessing.spawn(on_a_rank, (port, found), nprocs=RANKS)
    answers = {}
    while not found.empty():
        rank, dtype, values = found.get()
        answers[rank, dtype] = values
    # 0 gets the first of 1, 1 the last of 0, and 2 stands alone: the first of 0.
    assert {rank: answers[rank, "torch.int64"] for rank in range(3)} == {0: [[11, 1]], 1: [[2, 0]], 2: [[1, 1]]}
    assert answers[1, "torch.bool"] == [[True, False]]
    assert answers[2, "torch.float32"] == [[1.0, 1.0]]
