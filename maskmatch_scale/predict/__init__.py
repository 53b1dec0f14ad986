"""Predictions of images of one's own, by a run or by an export, and the files that hold them.

Decision: docs/decisions/0054-predictions-as-files.md.
"""
