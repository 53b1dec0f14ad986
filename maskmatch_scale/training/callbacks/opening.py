"""The first lines of a run: versions, ranks, model, precision, data, learning rate."""

from __future__ import annotations

import logging
import math
import platform

import torch

from maskmatch_scale import __version__
from maskmatch_scale.data.batches.cache_room import cache_lines
from maskmatch_scale.engine.precision import uses_tf32
from maskmatch_scale.progress import show
from maskmatch_scale.training.callbacks.base import Callback

log = logging.getLogger("maskmatch_scale")


class Opening(Callback):
    """Prints on rank 0, and logs on every rank, what is about to run."""

    def started(self) -> None:
        """Print and log the lines."""
        lines = self._lines()
        for line in lines:
            log.info(line)
        if self.run.runtime.rank == 0:
            show("\n".join(lines))

    def _unlabelled(self) -> str:
        """How many unlabelled samples there are, or shards, where nobody knows."""
        batches = self.run.batches
        if not batches.sequential:
            return f"{batches.unlabelled_samples} unlabelled"
        sequential = ", ".join(f"{len(source)} shards of {source.name!r}" for source in batches.sequential)
        return f"unlabelled ones of {sequential}, read in sequence"

    def _lines(self) -> list[str]:
        run, recipe, engine = self.run, self.run.recipe, self.run.recipe.engine
        place = run.runtime.place
        sizes = [(math.prod(getattr(p, "ds_shape", p.shape)), p.requires_grad) for p in run.student.parameters()]
        parameters, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
        of_them = f" ({trained / 1e6:.2f} M of them trained)" if trained < parameters else ""
        lines = [
            f"maskmatch_scale {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
            f"rank {place.rank} of {place.world_size} on {run.runtime.device}, {run.runtime.threads} CPU threads",
            f"{recipe.model.backbone}: {parameters / 1e6:.2f} M parameters{of_them}, {run.engine.name}, "
            f"{engine.precision} ({run.precision_reason})",
            f"{run.batches.labelled_samples} labelled samples, {self._unlabelled()}, from step {run.start}",
            *run.batches.notes,
            *(f"warning: {line}" for line in run.batches.label_warnings(run.data.classes)),
        ]
        if run.frozen_teacher is not None and run.frozen_facts is not None:
            module = run.frozen_teacher.module
            size = sum(parameter.numel() for parameter in module.parameters())
            lines.append(
                f"unlabelled images are labelled by {recipe.method.teacher}: a {module.family.title} of "
                f"{size / 1e6:.2f} M parameters, step {run.frozen_facts['step']}, frozen; evaluated is the average of "
                "the student"
            )
        lines += run.notes
        lines += cache_lines(run.batches, place.local_world_size)
        if uses_tf32(run.runtime.device, engine.precision):
            lines.append("products of fp32 matrices run in TF32")
        if recipe.optim.lr_reference_batch:
            lines.append(
                f"peak learning rate {run.engine.base_lr:.3g}: optim.lr={recipe.optim.lr:g}, "
                f"scaled from {recipe.optim.lr_reference_batch} to "
                f"{engine.micro_batch * engine.accumulation * place.world_size} labelled images a step"
            )
        unlabelled = engine.micro_batch * recipe.data.unlabelled_per_labelled
        if place.world_size == unlabelled == 1 and recipe.method.strong_view.cutmix_probability:
            lines.append(
                "no CutMix: it needs two unlabelled images in a micro-batch, and there is one; raise engine.micro_batch"
            )
        return lines
