"""A teacher that labels less: every second step, or at one scale a step."""

from __future__ import annotations

import base64
import io
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.ablation.variants.base import STATE, Variant
from maskmatch_scale.data.batches.batch import Batch
from maskmatch_scale.method.bases import PseudoLabels
from maskmatch_scale.method.maskmatch import Step
from maskmatch_scale.method.work import Work, step_work
from maskmatch_scale.recipe import MethodRecipe
from maskmatch_scale.training.run import Run


def _work(run: Run, method: MethodRecipe) -> Work:
    """What a step after the burn-in asks of the backbone with another section `method`, on one rank."""
    recipe = run.recipe
    images = recipe.engine.micro_batch * recipe.engine.accumulation
    unlabelled = images * recipe.data.unlabelled_per_labelled
    teacher = run.frozen_teacher.module if run.frozen_teacher is not None else None
    return step_work(run.student, method, recipe.data.crop_px, images, unlabelled, teacher=teacher)


def _mean_work(run: Run, scales: Sequence[tuple[float, ...]]) -> Work:
    """The mean over steps whose teacher labels at these scales each; at none: it labels nothing."""
    each = [_work(run, run.recipe.method.model_copy(update={"scales": own})) for own in scales]
    return Work(each[0].tokens, sum(work.flops for work in each) // len(each))


class LabelsTwice(Variant):
    """Every second step reuses unlabelled images and labels of the step before, with other strong views and masks.

    Labelled images are new in every step, and so are the draws: those of the images that the step would have seen,
    which are loaded all the same. A run of so many steps sees half as many unlabelled images.
    """

    period = 2

    def __init__(self, run: Run, steps: int) -> None:
        super().__init__(run, steps)
        run.work = _mean_work(run, [run.recipe.method.scales, ()])
        self._images: deque[tuple[Tensor, Tensor]] = deque()
        """Images and valid pixels of each micro-batch, for the step that uses them again."""
        self._labels: deque[PseudoLabels] = deque()
        self._again = False
        if kept := run.resumed.get(STATE):
            for images, valid, labels, confident in _unpacked(kept, run.runtime.device):
                self._images.append((images, valid))
                self._labels.append(PseudoLabels(labels.long(), confident))
        self._prepare, self._label = run.maskmatch.prepare, run.maskmatch.pseudo_label
        assert not run.maskmatch.base.needs_probabilities, "probabilities are not kept for a second step"
        run.maskmatch.prepare = self._prepare_once_or_again  # type: ignore[method-assign]
        run.maskmatch.pseudo_label = self._label_once_or_again  # type: ignore[method-assign]

    def before_step(self, step: int) -> None:
        """What was kept is used now."""
        self._again = bool(self._images)

    def _prepare_once_or_again(self, batch: Batch) -> Step:
        if self._again:
            images, valid = self._images.popleft()
            batch = replace(batch, unlabelled_images=images, unlabelled_valid=valid)
        elif batch.positions:  # not in the burn-in
            self._images.append((batch.unlabelled_images, batch.unlabelled_valid))
        return self._prepare(batch)

    def _label_once_or_again(self, step: Step, *teacher: Any, **normalise: Any) -> PseudoLabels | None:
        if self._again:
            return self._labels.popleft()
        pseudo = self._label(step, *teacher, **normalise)
        if pseudo is not None:
            self._labels.append(PseudoLabels(pseudo.labels, pseudo.confident))  # not mixed yet
        return pseudo

    def state(self) -> dict[str, Any]:
        """What the next step uses again: images as loaded and labels, some 100 kB an image of 168 px, as text."""
        kept = [
            (images, valid, own.labels.to(torch.uint8), own.confident)
            for (images, valid), own in zip(self._images, self._labels, strict=True)
        ]
        return {STATE: _packed(kept)} if kept else {}

    def summary(self) -> dict[str, Any]:
        """Nothing of it."""
        return {}


def _packed(tensors: object) -> str:
    file = io.BytesIO()
    torch.save(tensors, file)
    return base64.b64encode(zlib.compress(file.getvalue(), 1)).decode()


def _unpacked(text: str, device: torch.device) -> Any:
    return torch.load(io.BytesIO(zlib.decompress(base64.b64decode(text))), map_location=device, weights_only=True)


class ScalesInTurn(Variant):
    """The teacher labels at one of the recipe's three scales in each step, one after the other."""

    period = 3

    def __init__(self, run: Run, steps: int) -> None:
        super().__init__(run, steps)
        self._scales = run.recipe.method.scales
        assert len(self._scales) == self.period, "its cost repeats with the scales"
        run.work = _mean_work(run, [(scale,) for scale in self._scales])

    def before_step(self, step: int) -> None:
        """Set the scale; the recipe that the run and its checkpoints have is left as it is."""
        scale = self._scales[(step - self.first) % len(self._scales)]
        maskmatch = self.run.maskmatch
        maskmatch.recipe = maskmatch.recipe.model_copy(update={"scales": (scale,)})
