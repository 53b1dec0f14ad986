"""Checkpoints as files: what a run is continued from on any number of ranks, at any ZeRO stage, by either engine."""
