"""Strong views: photometric changes and CutMix, on batches, with parameters drawn for every image by itself.

Parameters are drawn on the host from (seed, purpose, position) and applied to the whole batch on its device. The
position of an image is a number made from its source, its epoch and its place in the epoch. So an image's views do not
depend on the other images of its batch, on its rank or on its worker. Only CutMix's partner does: it is the image
beside it in the global batch.

Decision: docs/decisions/0006-draws-by-place.md.
Decision: docs/decisions/0010-weak-view-on-cpu-strong-view-on-device.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from maskmatch_scale.recipe import StrongViewRecipe
from maskmatch_scale.seeds import generator, uniform

GREY_WEIGHTS = (0.299, 0.587, 0.114)
"""ITU-R 601 luma of red, green and blue, as torchvision's rgb_to_grayscale."""


@dataclass(frozen=True)
class _Photometric:
    """One image's drawn parameters; the neutral value leaves the image as it is."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    grey: bool = False
    blur_sigma_px: float = 0.0
    noise: float = 0.0
    noise_seed: int = 0


def _draw(recipe: StrongViewRecipe, source: torch.Generator) -> _Photometric:
    # Every number is drawn, also where it is not used, so that switching one operation off changes no draw of another.
    def factor(strength: float) -> float:
        return uniform(source, max(0.0, 1 - strength), 1 + strength)

    brightness, contrast, saturation = (factor(s) for s in (recipe.brightness, recipe.contrast, recipe.saturation))
    hue = uniform(source, -recipe.hue, recipe.hue)
    jittered = uniform(source, 0, 1) < recipe.jitter_probability
    grey = uniform(source, 0, 1) < recipe.grey_probability
    blurred = uniform(source, 0, 1) < recipe.blur_probability
    sigma = uniform(source, *recipe.blur_sigma_px)
    noise = uniform(source, 0, recipe.noise)
    noise_seed = int(torch.randint(2**31, (), generator=source))
    colours = (brightness, contrast, saturation, hue) if jittered else (1.0, 1.0, 1.0, 0.0)
    return _Photometric(*colours, grey, sigma if blurred else 0.0, noise, noise_seed)


def _purpose(what: str, view: int) -> str:
    """What the numbers of a strong view are drawn for: each view has a purpose of its own."""
    return what if view == 0 else f"{what} {view}"


def photometric(images: Tensor, recipe: StrongViewRecipe, seed: int, positions: Sequence[int], view: int = 0) -> Tensor:
    """Colour jitter, grey, Gaussian blur and noise (the strong view of UniMatch, without CutMix).

    Args:
        images: float (U, 3, h, w), values 0–1.
        recipe: strengths and probabilities.
        seed: of the run.
        positions: U numbers, see :attr:`Unlabelled.positions`.
        view: number of the strong view; each has draws of its own.

    Returns:
        float (U, 3, h, w), values 0–1.
    """
    drawn = [_draw(recipe, generator(seed, _purpose("strong view", view), position)) for position in positions]

    def column(values: list[float]) -> Tensor:
        return images.new_tensor(values).view(-1, 1, 1, 1)

    out = (images * column([d.brightness for d in drawn])).clamp(0, 1)
    mean = _grey(out).mean(dim=(1, 2, 3), keepdim=True)
    out = torch.lerp(mean, out, column([d.contrast for d in drawn])).clamp(0, 1)
    out = torch.lerp(_grey(out), out, column([d.saturation for d in drawn])).clamp(0, 1)
    if any(d.hue for d in drawn):
        out = _turn_hue(out, column([d.hue for d in drawn]))
    grey = column([float(d.grey) for d in drawn])
    out = torch.lerp(out, _grey(out).expand_as(out), grey)
    sigmas = [d.blur_sigma_px for d in drawn]
    if any(sigmas):
        # The kernel is as wide as the widest that the recipe allows, so an image's blur does not depend on its batch.
        out = _blur(out, sigmas, widest_px=recipe.blur_sigma_px[1])
    if any(d.noise for d in drawn):
        out = (out + torch.stack([_noise(d, out) for d in drawn])).clamp(0, 1)
    return out


def _grey(images: Tensor) -> Tensor:
    return (images * images.new_tensor(GREY_WEIGHTS).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn colours about the grey axis in YIQ: a linear map of RGB, one 3 × 3 matrix an image.

    Decision: docs/decisions/0011-hue-in-yiq.md.

    Args:
        images: float (U, 3, h, w), values 0–1.
        turns: float, U values: angles as shares of a full turn.
    """
    to_yiq = images.new_tensor([GREY_WEIGHTS, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
    angle = turns.flatten() * 2 * math.pi
    turn = torch.zeros(len(images), 3, 3, dtype=images.dtype, device=images.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -angle.sin(), angle.sin()
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    return torch.einsum("bij,bjhw->bihw", matrix, images).clamp(0, 1)


def _blur(images: Tensor, sigmas_px: list[float], widest_px: float) -> Tensor:
    """Separable Gaussian blur, one standard deviation an image (0 leaves it), reflected borders."""
    batch, channels, height, width = images.shape
    radius = min(math.ceil(3 * widest_px), height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    sigma = images.new_tensor(sigmas_px).clamp(min=1e-3).view(-1, 1)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=1).repeat_interleave(channels, 0)
    flat = images.reshape(1, batch * channels, height, width)
    flat = F.pad(flat, (radius, radius, 0, 0), mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=batch * channels)
    flat = F.pad(flat, (0, 0, radius, radius), mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=batch * channels)
    return flat.view(batch, channels, height, width)


def _noise(drawn: _Photometric, like: Tensor) -> Tensor:
    source = torch.Generator().manual_seed(drawn.noise_seed)
    noise = torch.randn(like.shape[-2:], generator=source) * drawn.noise
    return noise.to(like).expand(like.shape[1:])


@dataclass(frozen=True)
class Neighbour:
    """The rank beside this one (0 ↔ 1, 2 ↔ 3, …), which has the partner of this rank's odd image."""

    even: bool
    """Whether this rank's number is even. The neighbour has the partner of an even rank's last image, and of an odd
    rank's first one."""
    fetch: Callable[[Tensor, Tensor], Tensor]
    """Given this rank's first and last map, gives the partner's map. All ranks must call it together."""


@dataclass(frozen=True)
class CutMix:
    """Boxes in which each image shows its partner instead (CutMix between unlabelled images, as in UniMatch)."""

    inside: Tensor
    """bool (U, h, w): where the partner shows."""
    partner: Tensor
    """int64 (U,): number of the image beside it in the global batch; U stands for the neighbour's image."""
    neighbour: Neighbour | None = None
    """The other rank that has the partner of one of the images; None if all partners are on this rank."""

    def __call__(self, maps: Tensor) -> Tensor:
        """Mix images (U, C, h, w), or per-pixel maps (U, h, w) such as labels, confidence and validity.

        With a neighbour all ranks must call it together.
        """
        inside = self.inside[:, None] if maps.dim() == 4 else self.inside
        others = maps
        if self.neighbour is not None:
            others = torch.cat([maps, self.neighbour.fetch(maps[0], maps[-1])[None]])
        return torch.where(inside, others[self.partner], maps)


def draw_cutmix(
    recipe: StrongViewRecipe,
    seed: int,
    positions: Sequence[int],
    size_px: tuple[int, int],
    device: torch.device,
    neighbour: Neighbour | None = None,
    view: int = 0,
) -> CutMix:
    """Draw one box for each image, or none.

    An image's partner is the one beside it in the global batch (0 ↔ 1, 2 ↔ 3, …). So pairs are the same however the
    global batch is shared out among ranks. With an odd number of images on each rank some pairs lie on two neighbouring
    ranks. In an odd global batch the last image takes its box from the first.

    Args:
        recipe: cutmix_probability, cutmix_area.
        seed: of the run.
        positions: U numbers, see :attr:`Unlabelled.positions`.
        size_px: (h, w).
        device: of the result.
        neighbour: the rank beside this one; None if there is only one.
        view: number of the strong view; each has draws of its own.
    """
    height, width = size_px
    inside = torch.zeros(len(positions), height, width, dtype=torch.bool)
    for mask, position in zip(inside, positions):
        source = generator(seed, _purpose("cutmix", view), position)
        if uniform(source, 0, 1) >= recipe.cutmix_probability:
            continue
        area = uniform(source, *recipe.cutmix_area) * height * width
        aspect = math.exp(uniform(source, math.log(0.3), math.log(1 / 0.3)))
        rows = min(height, max(1, round(math.sqrt(area * aspect))))
        columns = min(width, max(1, round(math.sqrt(area / aspect))))
        top = int(torch.randint(height - rows + 1, (), generator=source))
        left = int(torch.randint(width - columns + 1, (), generator=source))
        mask[top : top + rows, left : left + columns] = True
    count = len(positions)
    if count % 2 == 0 or not recipe.cutmix_probability:
        neighbour = None
    partners = [i ^ 1 if i ^ 1 < count else 0 for i in range(count)]
    if neighbour is not None:
        # An odd rank's images begin with the second of a pair.
        partners = [i ^ 1 for i in range(count - 1)] if neighbour.even else [((i - 1) ^ 1) + 1 for i in range(1, count)]
        partners.insert(count - 1 if neighbour.even else 0, count)
    partner = torch.tensor(partners, dtype=torch.int64)
    return CutMix(inside.to(device, non_blocking=True), partner.to(device, non_blocking=True), neighbour)


@dataclass(frozen=True)
class View:
    """A view of the unlabelled images of one micro-batch."""

    images: Tensor
    """float (U, 3, h, w), values 0–1."""
    valid: Tensor
    """bool (U, h, w): ω, False on padding."""
    cutmix: CutMix | None
    """How images were mixed; pseudo-labels are mixed the same way."""


@dataclass(frozen=True)
class Unlabelled:
    """The unlabelled images of one micro-batch, and the views made of them."""

    weak: View
    positions: Sequence[int]
    """For each image the number that its draws depend on: `unlabelled_positions` of the `Batch`."""
    recipe: StrongViewRecipe
    seed: int
    neighbour: Neighbour | None = None
    """The rank beside this one."""
    _strong: dict[int, View] = field(default_factory=dict, repr=False, compare=False)

    def strong_view(self, number: int) -> View:
        """u_s = CutMix(photometric(u_w)), made once for each number.

        Views of different numbers are drawn independently of each other. With a neighbour all ranks must ask for a
        view together.

        Args:
            number: 0, 1, …
        """
        if number not in self._strong:
            images, valid = self.weak.images, self.weak.valid
            size = (images.shape[-2], images.shape[-1])
            draw = self.recipe, self.seed, self.positions
            cutmix = draw_cutmix(*draw, size, images.device, self.neighbour, view=number)
            changed = photometric(images, *draw, view=number)
            self._strong[number] = View(cutmix(changed), cutmix(valid), cutmix)
        return self._strong[number]
