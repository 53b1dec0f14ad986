"""Checkpoints as files: what a run is continued from on any number of ranks, at any ZeRO stage, by either engine.

    checkpoints/
      latest                    name of the newest complete checkpoint
      best                      names of the best ones, the best first, with their mIoU (`run.keep_best`)
      step-00000400/
        part-00000-of-00002.safetensors
                                pieces of tensors (pieces.py), written by rank 0 of 2; each key is NAME:START
        index.json              for each tensor its shape, its dtype, and where its pieces are; for each file its bytes
                                and SHA-256
        stream.json             what the training batches continue from (data/batches/training.py): one for all
                                ranks, with what each of them adds
        state.json              step, model, settings it was written with, state of engine and callbacks, frozen
                                teacher, versions

A checkpoint is complete or not there at all: ranks write into `.step-00000400.writing`, which rank 0 renames
(writing.py). The name of the folder means nothing: `state.json` says the step.

Decision: docs/decisions/0044-checkpoints-as-pieces-of-tensors.md.
Decision: docs/decisions/0045-checkpoints-written-in-the-background.md.
Decision: docs/decisions/0007-no-files-of-random-state.md.
"""
