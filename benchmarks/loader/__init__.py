"""Our training batches against the bare decoder, webdataset, litdata and mosaicml-streaming; their memory and state.

python -m benchmarks.loader --out benchmarks/results/loader.json --other-python .venv/peers/bin/python
"""
