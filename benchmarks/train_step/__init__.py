"""One whole MaskMatch step: ours against the straightforward implementation, and where its time goes.

python -m benchmarks.train_step --out benchmarks/results/train_step.json
"""
