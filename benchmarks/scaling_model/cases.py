"""What is scaled: five models, the step they take, and the cluster."""

from __future__ import annotations

from dataclasses import dataclass

from maskmatch_scale.planning.hardware import cluster_of, gpu_named
from maskmatch_scale.planning.setting import Cluster
from maskmatch_scale.recipe import Recipe, parse_recipe

GPU, LINK = "h100", "ib-ndr-400"
STAGES = (1, 2, 3)
CLASSES = 150


@dataclass(frozen=True)
class Case:
    """A model and what of it fits a GPU."""

    name: str
    backbone: str
    crop_px: int
    micro_batch: int
    checkpointing: bool = False

    def recipe(self, stage: int) -> Recipe:
        """MaskMatch on FixMatch with three scales and 30 % of the units in the masked view."""
        return parse_recipe(
            {
                "data": {"root": "nowhere", "crop_px": self.crop_px},
                "model": {"backbone": self.backbone, "num_classes": CLASSES},
                "engine": {
                    "zero_stage": stage,
                    "micro_batch": self.micro_batch,
                    "activation_checkpointing": self.checkpointing,
                },
                "run": {"dir": "nowhere", "steps": 1},
            }
        )


CASES = (
    Case("ViT-B", "timm/vit_base_patch14_dinov2", 532, 4),
    Case("ViT-L", "timm/vit_large_patch14_dinov2", 532, 4),
    Case("ViT-g", "timm/vit_giant_patch14_dinov2", 532, 4, checkpointing=True),
    Case("ViT-7B", "timm/vit_7b_patch16_dinov3", 512, 4, checkpointing=True),
    Case("SegFormer-b5", "transformers/segformer-b5", 512, 4),
)

GPUS = (1, 8, 16, 64, 256, 1024, 4096)


def cluster(gpus: int) -> Cluster:
    """So many H100s, 8 a host, each with an InfiniBand adapter of 400 Gbit/s."""
    return cluster_of(gpus, gpu_named(GPU), link=LINK)
