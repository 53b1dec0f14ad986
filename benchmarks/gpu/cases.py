"""Which benchmarks run on a GPU, at which sizes, in which order, and how long each will take by its operations.

The benchmarks themselves are not here: a case is a command line of one of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

import torch

from maskmatch_scale.method.work import step_work
from maskmatch_scale.models import Segmenter, build_segmenter
from maskmatch_scale.models.cost import encoder_train_macs
from maskmatch_scale.models.units import visible_count
from maskmatch_scale.recipe import MaskRecipe, MethodRecipe

SHARE_OF_PEAK = 0.15
"""Share of the GPU's peak that is assumed for an estimate. Low: SegFormer's many small operations do not fill a GPU."""
USUAL_PEAK_TFLOPS = 150.0
"""Assumed for a GPU whose peak is not known, 10¹² FLOP/s."""
START_S = {"masked_vs_full": 25.0, "train_step": 30.0, "engine_overhead": 45.0}
"""Seconds that imports, building and a first pass take, whatever the size."""
LEAST_PASS_S = 0.1
"""Assumed for a pass of any size: a SegFormer's passes take as long as launching their operations."""
PASSES = {"masked_vs_full": 16, "train_step": 13, "engine_overhead": 9}
"""Passes of a round."""
NO_DROPOUT = {"drop_path_rate": 0.0, "classifier_dropout_prob": 0.0}
"""Of a SegFormer in engine_overhead, which compares weights of several engines: they would draw in different orders."""


@dataclass(frozen=True)
class Case:
    """One run of a benchmark.

    `images` is `--batch` of masked_vs_full and engine_overhead, and `--images` of train_step: so many labelled ones,
    and as many unlabelled.
    """

    benchmark: str
    backbone: str
    image_size: int
    images: int
    repeats: int
    toy: bool = False
    variants: tuple[str, ...] = ()
    """Of engine_overhead, by parts of their names; none: all. All are in memory at once."""

    @property
    def name(self) -> str:
        """Of its files: benchmark, backbone and size in pixels."""
        return f"{self.benchmark}-{self.backbone.rpartition('/')[2]}-{self.image_size}"

    @property
    def keeps(self) -> tuple[float, ...]:
        """Keep ratios of masked_vs_full; train_step has the first."""
        return (0.5,) if self.toy else (0.3, 0.1, 0.5, 1.0)

    def options(self, device: str) -> list[str]:
        """The benchmark's command line without `--out`."""
        sizes = ["--image-size", str(self.image_size), "--backbone", self.backbone]
        half = device == "cuda"
        if self.benchmark == "masked_vs_full":
            keeps = ["--keep", *map(str, self.keeps), "--zero-keep", "0.5"]
            dtype = ["--dtype", "bfloat16" if half else "float32"]
            return [*sizes, *keeps, *dtype, "--batch", str(self.images), *self._timed("--repeats"), "--device", device]
        if self.benchmark == "train_step":
            precision = ["--precision", "autocast-bf16"] if half else []
            keep = ["--keep", str(self.keeps[0])]
            timed = self._timed("--repeats")
            return [*sizes, *keep, *precision, "--images", str(self.images), *timed, "--device", device]
        kinds = ["--bf16-only"] if half else ["--fp32-only"]
        memory = ["--memory-backbone", self.backbone]
        if self.backbone.startswith("transformers/"):
            kinds += ["--backbone-options", json.dumps(NO_DROPOUT)]
        if self.toy:
            kinds += ["--ranks", "1"]
        if self.variants:
            kinds += ["--variants", *self.variants]
        return [*sizes, *memory, *kinds, "--batch", str(self.images), *self._timed("--rounds")]

    def _timed(self, option: str) -> list[str]:
        return [option, str(self.repeats)]

    def estimate_s(self, peak_tflops: float | None) -> float:
        """Seconds that it will take on a GPU that can reach so many 10¹² FLOP/s, by the backbone's operations."""
        segmenter = _on_meta(self.backbone, self.image_size)
        size = (self.image_size, self.image_size)
        train = 2 * self.images * encoder_train_macs(segmenter, *size)
        if self.benchmark == "masked_vs_full":
            visible = [visible_count(segmenter.unit_grid(*size), keep) for keep in self.keeps]
            dropped = sum(2 * self.images * encoder_train_macs(segmenter, *size, units) for units in visible)
            # Ours, the library's, zeroed and the two whole models; forward alone is a third of both passes.
            round_flops = (5 * train + dropped) * 4 / 3
        elif self.benchmark == "train_step":
            recipe = MethodRecipe(mask=MaskRecipe(keep=self.keeps[0]))
            # Both steps, and once more in parts.
            round_flops = 4 * step_work(segmenter, recipe, size, self.images, self.images).flops
        else:
            round_flops = 9 * train
        round_s = round_flops / (SHARE_OF_PEAK * (peak_tflops or USUAL_PEAK_TFLOPS) * 1e12)
        # Five more rounds: warm-up, checks, memory, gathers.
        return START_S[self.benchmark] + (self.repeats + 5) * max(round_s, LEAST_PASS_S * PASSES[self.benchmark])


VIT_B, VIT_L = "timm/vit_base_patch16_224", "timm/vit_large_patch16_224"
B2, B5 = "transformers/segformer-b2", "transformers/segformer-b5"

BF16_WEIGHTS = ("ZeRO-1 bf16", "ZeRO-2 bf16", "ZeRO-3 bf16")

GPU_CASES = (
    Case("train_step", VIT_B, 512, 8, 10),
    Case("train_step", B2, 512, 8, 10),
    Case("masked_vs_full", VIT_B, 512, 16, 10),
    Case("masked_vs_full", B2, 512, 16, 10),
    Case("engine_overhead", VIT_B, 512, 8, 10),
    Case("train_step", VIT_L, 512, 8, 8),
    Case("train_step", B5, 512, 8, 8),
    Case("masked_vs_full", VIT_L, 1024, 4, 8),
    Case("masked_vs_full", B5, 1024, 4, 8),
    Case("engine_overhead", B2, 512, 8, 10),
    Case("train_step", VIT_L, 1024, 2, 6),
    Case("train_step", B5, 1024, 2, 6),
    Case("engine_overhead", VIT_L, 512, 4, 8, variants=BF16_WEIGHTS),
    Case("engine_overhead", B5, 512, 4, 8),
    Case("masked_vs_full", VIT_L, 512, 16, 8),
    Case("masked_vs_full", B5, 512, 16, 8),
    Case("masked_vs_full", VIT_B, 1024, 8, 8),
    Case("masked_vs_full", B2, 1024, 8, 8),
    Case("train_step", VIT_B, 1024, 4, 6),
    Case("train_step", B2, 1024, 4, 6),
)
"""Most wanted first: where the time ends, the rest is left out."""

TOY_CASES = (
    Case("masked_vs_full", "timm/vit_tiny_patch16_224", 64, 1, 1, toy=True),
    Case("train_step", "transformers/segformer-b0", 64, 1, 1, toy=True),
    Case("engine_overhead", "timm/vit_tiny_patch16_224", 64, 1, 1, toy=True, variants=("ZeRO-1", "ZeRO-3 fp32")),
)
"""What a CPU runs: not to measure, but to see that the commands are right."""


@cache
def _on_meta(backbone: str, side: int) -> Segmenter:
    with torch.device("meta"):
        return build_segmenter(backbone, 21, image_size=side)
