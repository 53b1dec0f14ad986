"""What a backbone family tells the rest of the package, and what a backbone built by it can do.

A family is one module or package beside this one, and one line in `models/families.py`. It says which names it takes,
how a backbone is built from one, and what such a backbone can do. No other code asks for a name's prefix or for the
class of an encoder. `tests/models/test_families.py` adds a family of its own to show this.

Decision: docs/decisions/0031-capabilities-asked-of-the-family.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from maskmatch_scale.models.units import Grid


class Macs(NamedTuple):
    """Multiply–adds of a forward pass over one image."""

    first: int
    """Of the first layer. Its input is the image, which needs no gradient, so its backward pass is cheaper."""
    rest: int
    """Of all other layers."""
    frozen: int = 0
    """Of layers that are frozen, with everything below them: they have no backward pass. If there are any, `first` is
    what reads their output without a norm of its own, since that output needs no gradient either."""


class Encoder(ABC):
    """A backbone and the two ways of running it: on whole images, and on visible units.

    An encoder is not a module. Its parameters stay in `model`, under the names of the library that the model is from.

    Attributes:
        model: the library's module.
        unit_px: side of a maskable unit, pixels.
        channels: C of every level, finest first.
        strides: pixels a token of every level.
        frozen_layers: how many of the first `layers` are frozen (`Segmenter.freeze`), with everything below them.
    """

    model: Any
    unit_px: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    frozen_layers: int = 0

    @property
    def layers(self) -> Sequence[nn.Module]:
        """What `optim.freeze` counts, in the order in which they run; empty: their number cannot be chosen."""
        return ()

    @property
    def after_layers(self) -> Sequence[nn.Module]:
        """Modules of `model` that run after the last of `layers`. All others run before the first."""
        return ()

    @property
    def patch_px(self) -> int:
        """Sides of whole images must be multiples of this, pixels; 1 if any size is taken."""
        return 1

    @property
    def prefix_tokens(self) -> int:
        """How many class and register tokens run beside those of the image."""
        return 0

    @property
    def position_px(self) -> tuple[int, int] | None:
        """Height and width of images, pixels, that the position embedding is laid out for; None if there is none.

        For other images it is resized at every call.
        """
        return None

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError if a whole image of height × width px cannot be taken, naming a size that can."""
        patch = self.patch_px
        if height % patch or width % patch:
            fits = [max(patch, round(side / patch) * patch) for side in (height, width)]
            raise ValueError(
                f"images: {height}×{width} px is not whole patches of {patch} px; resize or pad, e.g. to "
                f"{fits[0]}×{fits[1]}"
            )

    def unit_fits(self, unit_px: int) -> bool:
        """Whether the backbone could be built with another unit, of this side in pixels."""
        return False

    def fix_size(self, height: int, width: int) -> None:
        """From now on take whole images of height × width px alone, and compute nothing in a call that depends on it.

        For the graph of one size that is exported. Without a position embedding nothing has to be done for it.

        Raises:
            ValueError: no image of this size can be taken.
        """
        self.check_size(height, width)

    @abstractmethod
    def full(self, images: Tensor) -> list[Tensor]:
        """Encode whole images (B, in_channels, H, W): maps (B, C, h, w) of every level, finest first."""

    @abstractmethod
    def visible(self, images: Tensor, visible: Tensor, grid: Grid) -> list[Tensor]:
        """Encode visible units alone.

        Args:
            images: float (B, in_channels, H, W).
            visible: int64 (B, k), sorted indices of visible units.
            grid: (rows, cols) of units.

        Returns:
            Unit tokens (B, k, r, r, C) of every level, r = unit_px / stride.
        """

    @abstractmethod
    def macs(self, height: int, width: int, visible_units: int | None) -> Macs:
        """Multiply–adds of one image's forward pass, by the architecture; `models/cost.py` says what is counted.

        Args:
            height: of the image, pixels; the caller has checked that it fits.
            width: likewise.
            visible_units: how many units are visible; None: the whole image.
        """

    @abstractmethod
    def checkpoint_blocks(self) -> None:
        """From now on keep only the inputs of blocks for the backward pass, which then runs every block again.

        Activation checkpointing (Chen et al., arXiv 1604.06174): less memory and more time. Outputs and gradients stay
        the same, with and without a mask.
        """

    def compile_blocks(self) -> None:
        """Run every block through torch.compile from now on. Called only if `Family.compiles_blocks`."""
        raise NotImplementedError

    def layer_ids(self) -> dict[str, int]:
        """Number of the layer that each parameter belongs to, by its name in `model`, from 0 at the input.

        Layer-wise decay of the learning rate goes by it. Called only if `Family.numbers_layers`.
        """
        raise NotImplementedError


def allow_graphs(blocks: int) -> None:
    """Let torch.compile make as many graphs as this number of blocks needs.

    All blocks of student and teacher share one code object. Each may have another drop path, and so needs a graph of
    its own: in training, in evaluation, and for batches and images of several sizes. Beyond torch's limits the rest
    runs as it is, with a warning of torch's.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 24 * blocks)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 24 * blocks)


@dataclass(frozen=True)
class Wanted:
    """The backbone that `build_segmenter` asks a family for."""

    name: str
    """What follows the family's prefix."""
    num_classes: int
    levels: int
    """How many levels the head reads, for a family whose backbones leave a choice (`heads.head_levels`)."""
    image_size: int | tuple[int, int] | None
    """Side, or height and width, that position embeddings are laid out for, pixels; None: the model's own."""
    unit_px: int | None
    """Side of a unit, pixels; None: the family's usual one."""
    weights: Path | bool
    """False: random weights. True: the library's own weights. A path: a file or folder in the library's format."""
    options: dict[str, Any]
    """Keyword arguments of the library's model."""
    in_channels: int = 3
    """Channels of images. The family adapts the library's own weights to them and says so in its notes."""


@dataclass(frozen=True)
class Backbone:
    """What a family builds."""

    encoder: Encoder
    mean: tuple[float, ...]
    """Mean of red, green and blue in 0–1 that the weights expect, whatever the channels (`channels.statistics_of`)."""
    std: tuple[float, ...]
    """Per-channel standard deviation, likewise."""
    hidden_size: int = 256
    """Width of the fused features in a `segformer` head."""
    dropout: float = 0.1
    """Before the classifier of the heads that have dropout."""
    notes: tuple[str, ...] = ()
    """A line on each part of the weights that was not loaded."""
    read_weights: Callable[[], dict[str, Tensor]] | None = None
    """Reads weights, named as in a segmenter, when the head is built; for libraries whose weights may have a head."""


class Family(ABC):
    """A kind of backbone: what must be known of it by its name, before one is built.

    Attributes:
        prefix: how the names of its backbones begin, the slash included.
        title: what it is called in messages and tables, without an article.
        accepted: its names as messages show them.
        default_head: the head that is built where none is asked for.
        export_kind: how `maskmatch export` writes it: a key of `export.kinds.KINDS`.
        layer_title: what `optim.freeze` counts, in the plural.
        compiles_blocks: whether its encoders have `compile_blocks`.
        numbers_layers: whether its encoders have `layer_ids`.
        captured_whole: whether a CUDA graph of a pass in training has all that the pass does; not so if the host draws.
    """

    prefix: ClassVar[str]
    title: ClassVar[str]
    accepted: ClassVar[tuple[str, ...]]
    default_head: ClassVar[str]
    export_kind: ClassVar[str]
    layer_title: ClassVar[str] = "layers"
    compiles_blocks: ClassVar[bool] = False
    numbers_layers: ClassVar[bool] = False
    captured_whole: ClassVar[bool] = False

    @abstractmethod
    def build(self, wanted: Wanted) -> Backbone:
        """Build a backbone; random weights are drawn from torch's default generator.

        Raises:
            ValueError: a name, option, unit or weights file that does not fit; the message names it and what fits.
        """
