"""The training stream against the bare decoder, webdataset, litdata and mosaicml-streaming; its memory, its state.

python -m benchmarks.loader --out benchmarks/results/loader.json --other-python .venv/peers/bin/python
"""
