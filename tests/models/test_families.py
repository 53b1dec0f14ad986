"""A backbone family is one file: one that is defined here and registered by a fixture does all that others do.

Nothing outside this file knows of it: names, units, masked calls, layer-wise lr decay, cost, `maskmatch doctor` and
the checks before a run all ask the family or its encoder.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskmatch_scale.doctor import examine, explain
from maskmatch_scale.engine.optim import parameter_groups
from maskmatch_scale.export.kinds import KINDS
from maskmatch_scale.models import build_segmenter, families, units
from maskmatch_scale.models.backbone import Backbone, Encoder, Family, Macs, Wanted
from maskmatch_scale.models.cost import encoder_macs, encoder_train_macs
from maskmatch_scale.models.families import check_capabilities, family_of
from maskmatch_scale.models.units import Grid, gather_units
from maskmatch_scale.recipe import OptimRecipe

PATCH, WIDTH = 4, 16


class Patches(nn.Module):
    """Embeds patches and passes each through an MLP: no patch knows of another."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, H / patch, W / patch, C)."""
        tokens = self.embed(images).permute(0, 2, 3, 1)
        for block in self.blocks:
            tokens = tokens + F.gelu(block(tokens))
        return tokens


@dataclass
class PatchesEncoder(Encoder):
    """Runs `Patches`."""

    model: Any
    unit_px: int
    channels: tuple[int, ...] = (WIDTH,)
    strides: tuple[int, ...] = (PATCH,)

    @property
    def patch_px(self) -> int:
        return PATCH

    def full(self, images: Tensor) -> list[Tensor]:
        return [self.model(images).permute(0, 3, 1, 2)]

    def visible(self, images: Tensor, visible: Tensor, grid: Grid) -> list[Tensor]:
        cut = gather_units(images.contiguous(), visible, grid)
        return [self.model(cut.flatten(0, 1).permute(0, 3, 1, 2)).unflatten(0, visible.shape)]

    def macs(self, height: int, width: int, visible_units: int | None) -> Macs:
        pixels = height * width if visible_units is None else visible_units * self.unit_px**2
        tokens = pixels // PATCH**2
        return Macs(tokens * self.model.embed.weight.numel(), tokens * len(self.model.blocks) * WIDTH**2)

    def checkpoint_blocks(self) -> None:
        raise AssertionError("not asked for here")

    def layer_ids(self) -> dict[str, int]:
        return {
            name: 1 + int(name.split(".")[1]) if name.startswith("blocks") else 0
            for name, _ in self.model.named_parameters()
        }


class PatchesFamily(Family):
    """`patches/<depth>`."""

    prefix = "patches/"
    title = "Patches"
    accepted = ("patches/<depth>",)
    default_head = "linear"
    export_kind = "timm_vit"  # not exported here
    numbers_layers = True

    def build(self, wanted: Wanted) -> Backbone:
        return Backbone(PatchesEncoder(Patches(int(wanted.name)), wanted.unit_px or 16), (0.5,) * 3, (0.25,) * 3)


@pytest.fixture
def patches(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backbone of the family, which is registered."""
    monkeypatch.setattr(families, "FAMILIES", [*families.FAMILIES, PatchesFamily()])
    return "patches/3"


def test_a_segmenter_of_a_new_family_runs_whole_and_masked(patches: str) -> None:
    torch.manual_seed(0)
    segmenter = build_segmenter(patches, 5).double()
    assert (segmenter.unit_px, segmenter.patch_px, segmenter.mean) == (16, PATCH, (0.5, 0.5, 0.5))
    images = torch.randn(2, 3, 48, 64).double()
    logits = segmenter(images)
    assert logits.shape == (2, 5, 12, 16)
    everything = torch.arange(12).expand(2, -1)
    torch.testing.assert_close(segmenter(images, everything), logits)
    visible = torch.tensor([[0, 7], [3, 11]])
    painted = images.masked_fill(~units.visible_pixel_mask(visible, (3, 4), 16)[:, None], torch.nan)
    assert segmenter(painted, visible).equal(segmenter(images, visible))
    assert copy.deepcopy(segmenter)(images).equal(logits)
    with pytest.raises(ValueError, match=r"48×62 px is not whole patches of 4 px.*48×64"):
        segmenter(images[..., :62])


def test_a_new_family_trains(patches: str) -> None:
    torch.manual_seed(0)
    segmenter = build_segmenter(patches, 5).train()
    groups = parameter_groups(segmenter, OptimRecipe(layer_decay=0.5, head_lr_multiplier=3.0))
    scales = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    expected = {"embed": 0.5**3, "blocks.0": 0.5**2, "blocks.1": 0.5, "blocks.2": 1.0}
    for name, parameter in segmenter.backbone.named_parameters():
        assert scales[id(parameter)] == expected[name.rpartition(".")[0]]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(5, (2, 8, 8))
    visible = torch.tensor([[0, 3], [1, 2]])
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(segmenter(images), labels) + F.cross_entropy(segmenter(images, visible), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in segmenter.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_cost_and_doctor_ask_the_family(patches: str) -> None:
    segmenter = build_segmenter(patches, 5)
    first, rest = 64 * 3 * PATCH**2 * WIDTH, 64 * 3 * WIDTH**2
    assert encoder_macs(segmenter, 32, 32) == first + rest
    assert encoder_train_macs(segmenter, 32, 32, 1) == (2 * first + 3 * rest) / 4
    found = examine(patches, 32, keep=0.25)
    assert (found["family"], found["unit_px"], found["tokens"], found["prefix_tokens"]) == ("Patches", 16, [64], 0)
    assert (found["visible_units"], found["ideal_speedup"]) == (1, 4)
    assert explain(found)["supported"] == "yes, Patches"


def test_what_a_family_cannot_do_is_refused_by_its_name(patches: str) -> None:
    check_capabilities(patches, compile_blocks=False, layer_decay=0.5)
    with pytest.raises(
        ValueError,
        match=r"model.backbone=patches/3 with engine.compile=true: only the blocks of a ViT or a SegFormer are",
    ):
        check_capabilities(patches, compile_blocks=True, layer_decay=1.0)
    with pytest.raises(ValueError, match="leave a Patches as it is"):
        build_segmenter(patches, 2).compile_blocks()
    with pytest.raises(ValueError, match=r"defined for a ViT's or a Patches's blocks"):
        check_capabilities("transformers/segformer-b0", compile_blocks=False, layer_decay=0.5)
    with pytest.raises(ValueError, match=r"'patches/' is neither timm/<model name>, .* nor patches/<depth>$"):
        family_of("patches/")


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.title)
def test_every_family_keeps_what_it_promises(family: Family) -> None:
    backbone = {"ViT": "timm/vit_tiny_patch16_224", "SegFormer": "transformers/segformer-b0"}[family.title]
    assert family_of(backbone) is family
    assert family.export_kind in KINDS
    with torch.device("meta"):
        segmenter = build_segmenter(backbone, 2)
    overridden = type(segmenter.encoder)
    assert family.compiles_blocks == (overridden.compile_blocks is not Encoder.compile_blocks)
    assert family.numbers_layers == (overridden.layer_ids is not Encoder.layer_ids)
    if family.numbers_layers:
        assert segmenter.layer_ids().keys() == {f"backbone.{n}" for n, _ in segmenter.backbone.named_parameters()}
    else:
        with pytest.raises(ValueError, match="layer_decay"):
            segmenter.layer_ids()
