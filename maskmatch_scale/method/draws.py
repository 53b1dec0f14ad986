"""Random numbers of the views of unlabelled images, drawn in the loader processes.

What is drawn for an image depends on (seed, purpose, position of the image) alone. All of it is one row of float64
numbers, a few hundred bytes, which reaches the device together with the image. A step then draws nothing, and nothing
in it waits for a copy from the host.

Decision: docs/decisions/0035-draws-in-loader-processes.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from maskmatch_scale.models.units import Grid, masked_units, sample_visible
from maskmatch_scale.recipe import StrongViewRecipe
from maskmatch_scale.seeds import generator, uniform

PHOTOMETRIC = ("brightness", "contrast", "saturation", "hue", "grey", "blur_sigma_px", "noise", "noise_seed")
"""Columns of the photometric numbers of a strong view. Neutral values leave the image as it is."""

BOX = ("top", "left", "bottom", "right")
"""Columns of the CutMix box of a strong view, px; all 0: no box."""

_A_VIEW = len(PHOTOMETRIC) + len(BOX)


@dataclass(frozen=True)
class ViewDraws:
    """Draws the numbers of unlabelled images. Picklable, so that loader processes can have it.

    Attributes:
        recipe: strengths and probabilities of strong views.
        seed: of the run.
        strong_views: how many the base asks for.
        size_px: (h, w) of the images.
        grid: (rows, cols) of units; None: no units are drawn.
        visible: units that stay visible in the masked view; 0: there is none.
        complement: whether as many of the masked units are drawn for a second masked view.
        base_views: how many views of the base the student sees in part; 0: it sees them whole.
        base_visible: units that stay visible in each of these.
        feature_seed: whether a seed is drawn for what the base does to features.
    """

    recipe: StrongViewRecipe
    seed: int
    strong_views: int
    size_px: tuple[int, int]
    grid: Grid | None
    visible: int
    base_views: int = 0
    base_visible: int = 0
    feature_seed: bool = False
    complement: bool = False

    @property
    def width(self) -> int:
        """Numbers for each image."""
        fixed = self.strong_views * _A_VIEW + int(self.feature_seed)
        return fixed + (1 + self.complement) * self.visible + self.base_views * self.base_visible

    def __call__(self, positions: Sequence[int]) -> Tensor:
        """Draw for images.

        Args:
            positions: U numbers, `Batch.positions`.

        Returns:
            float64 (U, width), on the host.
        """
        rows = torch.empty(len(positions), self.width, dtype=torch.float64)
        for row, position in zip(rows, positions, strict=True):
            numbers: list[float] = []
            for view in range(self.strong_views):
                numbers += self._photometric(generator(self.seed, _purpose("strong view", view), position))
                numbers += self._box(generator(self.seed, _purpose("cutmix", view), position))
            if self.feature_seed:
                numbers.append(_draw_seed(generator(self.seed, "features", position)))
            parts = [torch.tensor(numbers, dtype=torch.float64)]
            if self.visible:
                parts += self._masks(position)
            for view in range(self.base_views):
                parts.append(self._units(self.base_visible, _purpose("strong mask", view), position))
            torch.cat(parts, out=row)
        return rows

    def _masks(self, position: int) -> list[Tensor]:
        """Visible units of the masked view, and of the second one if there is one: float64 (visible,) each."""
        first = self._units(self.visible, "mask", position)
        if not self.complement:
            return [first]
        assert self.grid is not None
        others = masked_units(first[None].long(), self.grid)[0]
        drawn = sample_visible(1, (1, len(others)), self.visible, generator(self.seed, "second mask", position))[0]
        return [first, others[drawn].double()]

    def _units(self, visible: int, purpose: str, position: int) -> Tensor:
        """Visible units of one image: float64 (visible,)."""
        assert self.grid is not None
        return sample_visible(1, self.grid, visible, generator(self.seed, purpose, position))[0].double()

    def _photometric(self, source: torch.Generator) -> list[float]:
        # Every number is drawn, also where it is not used, so that switching one operation off changes no draw of
        # another.
        recipe = self.recipe

        def factor(strength: float) -> float:
            return uniform(source, max(0.0, 1 - strength), 1 + strength)

        brightness, contrast, saturation = (factor(s) for s in (recipe.brightness, recipe.contrast, recipe.saturation))
        hue = uniform(source, -recipe.hue, recipe.hue)
        jittered = uniform(source, 0, 1) < recipe.jitter_probability
        grey = uniform(source, 0, 1) < recipe.grey_probability
        blurred = uniform(source, 0, 1) < recipe.blur_probability
        sigma = uniform(source, *recipe.blur_sigma_px)
        noise = uniform(source, 0, recipe.noise)
        noise_seed = _draw_seed(source)
        colours = [brightness, contrast, saturation, hue] if jittered else [1.0, 1.0, 1.0, 0.0]
        return [*colours, float(grey), sigma if blurred else 0.0, noise, noise_seed]

    def _box(self, source: torch.Generator) -> list[float]:
        recipe, (height, width) = self.recipe, self.size_px
        if uniform(source, 0, 1) >= recipe.cutmix_probability:
            return [0.0] * len(BOX)
        area = uniform(source, *recipe.cutmix_area) * height * width
        aspect = math.exp(uniform(source, math.log(0.3), math.log(1 / 0.3)))
        rows = min(height, max(1, round(math.sqrt(area * aspect))))
        columns = min(width, max(1, round(math.sqrt(area / aspect))))
        top = int(torch.randint(height - rows + 1, (), generator=source))
        left = int(torch.randint(width - columns + 1, (), generator=source))
        return [float(top), float(left), float(top + rows), float(left + columns)]


@dataclass(frozen=True)
class Drawn:
    """What was drawn for the unlabelled images of one micro-batch, on their device."""

    rows: Tensor
    """float64 (U, width), as :class:`ViewDraws` made them."""
    strong_views: int
    """Of the `ViewDraws`, like the following."""
    base_views: int = 0
    base_visible: int = 0
    feature_seed: bool = False
    complement: bool = False

    def photometric(self, view: int) -> dict[str, Tensor]:
        """Numbers of a strong view by the names in `PHOTOMETRIC`: float64 (U,) each."""
        start = view * _A_VIEW
        return dict(zip(PHOTOMETRIC, self.rows[:, start : start + len(PHOTOMETRIC)].unbind(1), strict=True))

    def boxes(self, view: int) -> Tensor:
        """CutMix boxes of a strong view: int64 (U, 4), top, left, bottom, right in px."""
        start = view * _A_VIEW + len(PHOTOMETRIC)
        return self.rows[:, start : start + len(BOX)].long()

    @property
    def feature_seeds(self) -> Tensor:
        """Seeds of what a base does to features: int64 (U,), 0 to 2³¹ - 1."""
        assert self.feature_seed, "the base does not say that it perturbs features"
        return self.rows[:, self.strong_views * _A_VIEW].long()

    @property
    def visible(self) -> Tensor:
        """Visible units of the masked view: int64 (U, k), sorted; (2 · U, k) of two, one view after the other."""
        start = self.strong_views * _A_VIEW + int(self.feature_seed)
        return _by_view(self.rows[:, start : self._base_start], 1 + self.complement)

    @property
    def visible_of_base(self) -> Tensor:
        """Visible units of the base's views, one view after the other: int64 (base_views · U, base_visible), sorted."""
        return _by_view(self.rows[:, self._base_start :], self.base_views)

    @property
    def _base_start(self) -> int:
        return self.rows.shape[1] - self.base_views * self.base_visible


def _by_view(units: Tensor, views: int) -> Tensor:
    """Units of several views, float64 (U, views · k), one view after the other: int64 (views · U, k)."""
    return torch.cat(units.long().chunk(views, 1))


def _draw_seed(source: torch.Generator) -> float:
    """A seed for numbers that are made on the device (`views.hash32`): 0 to 2³¹ - 1, exact in float64."""
    return float(torch.randint(2**31, (), generator=source))


def _purpose(what: str, view: int) -> str:
    """What the numbers of a view are drawn for: each view has a purpose of its own."""
    return what if view == 0 else f"{what} {view}"
