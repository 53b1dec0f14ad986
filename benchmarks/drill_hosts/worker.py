"""A rank that times all-reduces: ``python -m benchmarks.drill_hosts.worker REPEATS BYTES …`` with torch's variables.

Rank 0 prints a line `BYTES SECONDS` for each size, the median.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import torch
from torch import distributed as dist


def main() -> None:
    """Sizes in turn, so that a slow second hits all alike."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    repeats, sizes = int(sys.argv[1]), list(map(int, sys.argv[2:]))
    tensors = {size: torch.zeros(size // 4) for size in sizes}
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for repeat in range(repeats + 1):
        for size, tensor in tensors.items():
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(tensor)
            if repeat:  # the first one opens connections
                seconds[size].append(time.perf_counter() - began)
    if dist.get_rank() == 0:
        for size in sizes:
            print(size, median(seconds[size]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
