"""What programs reach of data sheets: each figure by its name, with where it comes from.

They are kept apart from the data sheets, so that a plan can say both. A measurement of the machine replaces all of them
(`planning/measure.py`).
"""

from __future__ import annotations

PRODUCTS = 0.7
"""Share of a GPU's peak that products of matrices and attention reach. With `MEMORY` it gives the seconds of a ViT-B's
encoder, 16 images of 512 px, bf16, forward and with backward, on an H100:
benchmarks/results/gpu/masked_vs_full-vit_base_patch16_224-512.json. Two figures from two measurements."""
CONVOLUTIONS = 0.3
"""Share of the peak that convolutions reach. Not measured: an assumption, and a small part of any step here."""
MEMORY = 0.34
"""Share of the memory's bandwidth that operations without products reach, each by itself: see `PRODUCTS`."""
NETWORK = 0.8
"""Share of a link's bandwidth that large collectives reach. No network of GPUs was measured: an assumption."""
LAUNCH_S = 39e-6
"""Seconds of the host for each operation of a step, Python and autograd included: median over the parts of
benchmarks/results/gpu/train_step-*.json, a ViT-B and a SegFormer-b2 on the host of an H100, which launched them more
slowly than the GPU computed them (34 to 42 µs)."""
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
