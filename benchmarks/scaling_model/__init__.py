"""From 1 to 4,096 GPUs on paper: step time, checkpoints, failures, and a billion images.

Nothing here was run on a cluster. `maskmatch_scale/planning` predicts; what can be measured on one machine is compared
(`check.py`). docs/scaling.md says what follows.
"""
