"""The benchmarks on a GPU within a time budget: masked_vs_full, train_step and engine_overhead at the sizes it is for.

python -m benchmarks.gpu --out benchmarks/results/gpu --minutes 16
"""
