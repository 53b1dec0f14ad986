"""Trackers: services and files outside the run directory that are sent the records of `metrics.jsonl`.

Decision: docs/decisions/0052-trackers-in-threads.md.
"""
