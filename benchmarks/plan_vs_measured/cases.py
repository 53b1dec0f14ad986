"""What is planned and run: small models of both families, at every ZeRO stage, crop and keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.planning.subject import Subject
from maskmatch_scale.recipe import Recipe, parse_recipe

RANKS = 2
BACKBONES = {"vit": "timm/vit_tiny_patch16_224", "segformer": "transformers/segformer-b0"}
CROPS_PX = (128, 160, 192, 256)
KEEPS = (0.3, 0.5, 0.75)
STAGES = (0, 1, 2, 3)
CLASSES, IMAGES, SCALES = 21, 2, (0.5, 1.0)


@dataclass(frozen=True)
class Case:
    """One run. Fields are columns of the result."""

    family: str
    stage: int
    crop_px: int
    keep: float
    precision: str = "fp32"
    checkpointing: bool = False

    @property
    def recipe(self) -> Recipe:
        """FixMatch with a masked view and two scales, one micro-batch a step."""
        content: dict[str, dict[str, Any]] = {
            "data": {"root": "planned", "crop_px": self.crop_px},
            "model": {"backbone": BACKBONES[self.family], "num_classes": CLASSES},
            "method": {"mask": {"keep": self.keep}, "scales": list(SCALES)},
            "engine": {
                "zero_stage": self.stage,
                "precision": self.precision,
                "micro_batch": IMAGES,
                "activation_checkpointing": self.checkpointing,
                "threads": 1,
            },
            "run": {"steps": 1000, "dir": "planned"},
        }
        return parse_recipe(content)

    def student(self) -> Segmenter:
        """With random weights, where torch's default device says; the head of the family, or one that fits bf16."""
        head = "linear" if self.precision == "bf16" else None
        return build_segmenter(BACKBONES[self.family], CLASSES, head=head, checkpoint_activations=self.checkpointing)


def cases(*, quick: bool = False) -> list[Case]:
    """All of them: every stage with every crop, and with every keep; a quick run has one for each stage and family.

    Autocast, which DeepSpeed leaves switched on for the process, comes last.
    """
    if quick:
        return [Case(family, stage, CROPS_PX[0], KEEPS[1]) for family in BACKBONES for stage in STAGES]
    grid = [
        Case(family, stage, crop, KEEPS[(stage + number) % len(KEEPS)])
        for number, crop in enumerate(CROPS_PX)
        for family in BACKBONES
        for stage in STAGES
    ]
    crop, keep = CROPS_PX[-1], KEEPS[1]
    return [*grid, *_others(crop, keep)]


def _others(crop: int, keep: float) -> Iterator[Case]:
    yield Case("segformer", 1, crop, keep, checkpointing=True)
    yield Case("vit", 1, crop, keep, "bf16")
    yield Case("vit", 3, crop, keep, "bf16")
    yield Case("segformer", 2, crop, keep, "autocast-bf16")


class Subjects:
    """Subjects of cases. Cases of one model share it, so that its passes are traced once."""

    def __init__(self) -> None:
        self._students: dict[tuple[Any, ...], Segmenter] = {}

    def of(self, case: Case) -> Subject:
        """What a plan for the case is made of."""
        key = (case.family, case.precision == "bf16", case.checkpointing)
        if key not in self._students:
            with torch.device("meta"):
                self._students[key] = case.student()
        return Subject(case.recipe, self._students[key], None, IMAGES, IMAGES, "cpu")
