"""What the engine costs: a step at every ZeRO stage against torch's DDP, the teacher's average, bytes of model states.

python -m benchmarks.engine_overhead --out benchmarks/results/engine_overhead.json
"""
