"""What programs reach of data sheets: each figure by its name, with where it comes from.

They are kept apart from the data sheets, so that a plan can say both. A measurement of the machine replaces all of them
(`planning/measure.py`).
"""

from __future__ import annotations

PRODUCTS = 0.6
"""Share of a GPU's peak that large products of matrices reach."""
ATTENTION = 0.4
"""Share of the peak that a fused kernel of attention reaches."""
CONVOLUTIONS = 0.3
"""Share of the peak that convolutions reach."""
MEMORY = 0.75
"""Share of the memory's bandwidth that elementwise operations reach."""
NETWORK = 0.8
"""Share of a link's bandwidth that large collectives reach. No network of GPUs was measured: an assumption."""
LAUNCH_S = 8e-6
"""Seconds of the host for each operation of a step."""
DECODED_A_CORE = 346.0
"""Samples/s that a core reads, decodes and cuts: `ours`, local shards, 2 processes, in
benchmarks/results/loader.json; JPEGs 640 px wide, crops of 512 px."""
DECODED_BYTES = 100_200.0
"""Bytes of those JPEGs on average."""
HOST_MEMORY = 100e9
"""Bytes/s of a host's memory for each GPU's share of an offloaded optimizer step. Not measured: an assumption."""
HOST_LINK = 25e9
"""Bytes/s between a GPU and its host's memory, pinned, over PCIe 4. Not measured: an assumption."""
ADAMW_BYTES = 28.0
"""Of a parameter in a step of AdamW: master, gradient and two moments read, master and moments written, in fp32."""
LERP_BYTES = 12.0
"""Of a parameter in an update of the average."""
