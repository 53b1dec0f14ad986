"""Strong views: photometric changes and CutMix, on batches, with parameters drawn for every image by itself.

Parameters were drawn from (seed, purpose, position) in a loader process (`draws.py`), and are applied here to the whole
batch on its device. The position of an image is a number made from its source, its epoch and its place in the epoch. So
an image's views do not depend on the other images of its batch, on its rank or on its worker. Only CutMix's partner
does: it is the image beside it in the global batch.

Nothing here waits for the device: no number is read from it, and none is copied to it.

Decision: docs/decisions/0010-weak-view-on-cpu-strong-view-on-device.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from maskmatch_scale.method.draws import Drawn
from maskmatch_scale.recipe import StrongViewRecipe

GREY_WEIGHTS = (0.299, 0.587, 0.114)
"""ITU-R 601 luma of red, green and blue, as torchvision's rgb_to_grayscale."""


class Colours(nn.Module):
    """Constants of colour space, kept on the device with the module that holds them.

    Args:
        rgb: whether the channels are red, green and blue. Otherwise they are bands without colours: grey is their mean,
            contrast is about each band's own mean, and there is no hue to turn.

    Decision: docs/decisions/0083-other-channels-than-rgb.md.
    """

    grey: Tensor
    to_yiq: Tensor
    from_yiq: Tensor

    def __init__(self, *, rgb: bool = True) -> None:
        super().__init__()
        self.rgb = rgb
        to_yiq = torch.tensor([GREY_WEIGHTS, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
        self.register_buffer("grey", torch.tensor(GREY_WEIGHTS).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("to_yiq", to_yiq, persistent=False)
        self.register_buffer("from_yiq", torch.linalg.inv(to_yiq), persistent=False)


def photometric(images: Tensor, recipe: StrongViewRecipe, drawn: Mapping[str, Tensor], colours: Colours) -> Tensor:
    """Colour jitter, grey, Gaussian blur and noise (the strong view of UniMatch, without CutMix).

    Which operations run is decided by the recipe alone: what was drawn is on the device, and reading it would wait.

    Args:
        images: float (U, C, h, w), values 0–1.
        recipe: strengths and probabilities.
        drawn: float64 (U,) for each name of `draws.PHOTOMETRIC`.
        colours: what the channels are, and constants on the images' device.

    Returns:
        float (U, C, h, w), values 0–1.
    """

    def column(name: str) -> Tensor:
        return drawn[name].to(images.dtype).view(-1, 1, 1, 1)

    out = (images * column("brightness")).clamp(0, 1)
    mean = _grey(out, colours).mean(dim=(1, 2, 3), keepdim=True) if colours.rgb else out.mean((2, 3), keepdim=True)
    out = torch.lerp(mean, out, column("contrast")).clamp(0, 1)
    out = torch.lerp(_grey(out, colours), out, column("saturation")).clamp(0, 1)
    if recipe.hue and colours.rgb:
        out = _turn_hue(out, column("hue"), colours)
    out = torch.lerp(out, _grey(out, colours).expand_as(out), column("grey"))
    if recipe.blur_probability:
        # The kernel is as wide as the widest that the recipe allows, so an image's blur does not depend on its batch.
        out = _blur(out, drawn["blur_sigma_px"].to(images.dtype), widest_px=recipe.blur_sigma_px[1])
    if recipe.noise:
        noise = standard_normal(drawn["noise_seed"].long(), (out.shape[-2], out.shape[-1])).to(out.dtype)
        out = (out + noise[:, None] * column("noise")).clamp(0, 1)
    return out


def _grey(images: Tensor, colours: Colours) -> Tensor:
    """(U, 1, h, w): luma of RGB; the mean of bands."""
    if not colours.rgb:
        return images.mean(1, keepdim=True)
    return (images * colours.grey.to(images.dtype)).sum(1, keepdim=True)


def _turn_hue(images: Tensor, turns: Tensor, colours: Colours) -> Tensor:
    """Turn colours about the grey axis in YIQ: a linear map of RGB, one 3 × 3 matrix an image.

    Decision: docs/decisions/0011-hue-in-yiq.md.

    Args:
        images: float (U, 3, h, w), values 0–1.
        turns: float, U values: angles as shares of a full turn.
        colours: constants, on the images' device.
    """
    angle = turns.flatten() * 2 * math.pi
    turn = torch.zeros(len(images), 3, 3, dtype=images.dtype, device=images.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -angle.sin(), angle.sin()
    matrix = colours.from_yiq.to(images.dtype) @ turn @ colours.to_yiq.to(images.dtype)
    return torch.einsum("bij,bjhw->bihw", matrix, images).clamp(0, 1)


def _blur(images: Tensor, sigmas_px: Tensor, widest_px: float) -> Tensor:
    """Separable Gaussian blur, one standard deviation an image (0 leaves it), reflected borders."""
    batch, channels, height, width = images.shape
    radius = min(math.ceil(3 * widest_px), height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    sigma = sigmas_px.clamp(min=1e-3).view(-1, 1)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=1).repeat_interleave(channels, 0)
    flat = images.reshape(1, batch * channels, height, width)
    flat = F.pad(flat, (radius, radius, 0, 0), mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=batch * channels)
    flat = F.pad(flat, (0, 0, radius, radius), mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=batch * channels)
    return flat.view(batch, channels, height, width)


def standard_normal(seeds: Tensor, size: tuple[int, int]) -> Tensor:
    """Normally distributed numbers that depend on (seed, place) alone, made where the seeds are.

    A hash of counters (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), of 32 bits (Wellons'
    lowbias32), and the Box–Muller transform. A generator of torch would be one object and one launch an image, and
    would give other numbers on another device.

    Args:
        seeds: int64 (U,), 0 to 2³² - 1.
        size: (h, w).

    Returns:
        float32 (U, h, w), mean 0, standard deviation 1.
    """
    counter = torch.arange(size[0] * size[1], device=seeds.device)
    key = hash32(seeds)[:, None]
    radius, angle = (hash32(key ^ hash32(2 * counter + number)).double().add_(0.5) / 2**32 for number in (0, 1))
    normal = radius.log().mul_(-2).sqrt_() * angle.mul_(2 * math.pi).cos_()
    return normal.float().view(len(seeds), *size)


def hash32(values: Tensor) -> Tensor:
    """Hash of the lower 32 bits of int64 values, elementwise: int64, 0 to 2³² - 1."""
    x = values & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF  # may pass 2⁶³; the lower 32 bits stay right
    return x ^ (x >> 16)


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
        return self.mix(self.with_partners(maps))

    def with_partners(self, maps: Tensor) -> Tensor:
        """Maps (U, …) of any size and, if one image's partner is on the neighbouring rank, that image's: (U + 1, …).

        With a neighbour all ranks must call it together.
        """
        if self.neighbour is None:
            return maps
        return torch.cat([maps, self.neighbour.fetch(maps[0], maps[-1])[None]])

    def mix(self, maps: Tensor, rows: slice = slice(None)) -> Tensor:
        """Mix some rows of images or of per-pixel maps. Nothing is exchanged.

        Args:
            maps: (U or U + 1, C, rows, w) or (U or U + 1, rows, w), as `with_partners` gives them.
            rows: which rows of the image they are.

        Returns:
            (U, C, rows, w) or (U, rows, w).
        """
        inside = self.inside[:, rows]
        if maps.dim() == 4:
            inside = inside[:, None]
        return torch.where(inside, maps[self.partner], maps[: len(self.partner)])


def cutmix_of(boxes: Tensor, size_px: tuple[int, int], neighbour: Neighbour | None = None) -> CutMix:
    """CutMix by drawn boxes.

    An image's partner is the one beside it in the global batch (0 ↔ 1, 2 ↔ 3, …). So pairs are the same however the
    global batch is shared out among ranks. With an odd number of images on each rank some pairs lie on two neighbouring
    ranks. In an odd global batch the last image takes its box from the first.

    Args:
        boxes: int64 (U, 4), see `draws.BOX`.
        size_px: (h, w).
        neighbour: the rank beside this one; None if there is only one.
    """
    count, device = len(boxes), boxes.device
    rows = torch.arange(size_px[0], device=device)[None, :, None]
    columns = torch.arange(size_px[1], device=device)[None, None, :]
    top, left, bottom, right = (edge[:, None, None] for edge in boxes.unbind(1))
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    number = torch.arange(count, device=device)
    if count % 2 == 0:
        return CutMix(inside, number ^ 1)
    if neighbour is None:
        return CutMix(inside, torch.where(number == count - 1, 0, number ^ 1))
    # `count` stands for the neighbour's image. An odd rank's images begin with the second of a pair.
    if neighbour.even:
        return CutMix(inside, torch.where(number == count - 1, count, number ^ 1), neighbour)
    return CutMix(inside, torch.where(number == 0, count, ((number - 1) ^ 1) + 1), neighbour)


@dataclass(frozen=True)
class View:
    """A view of the unlabelled images of one micro-batch."""

    images: Tensor
    """float (U, C, h, w), values 0–1."""
    valid: Tensor
    """bool (U, h, w): ω, False on padding."""
    cutmix: CutMix | None
    """How images were mixed; pseudo-labels are mixed the same way."""


@dataclass(frozen=True)
class Unlabelled:
    """The unlabelled images of one micro-batch (or labelled ones, `method.views_of`), and the views made of them."""

    weak: View
    positions: Sequence[int]
    """For each image the number that its draws depend on: `positions` of the `Batch`."""
    drawn: Drawn
    """What was drawn for the images from their positions."""
    recipe: StrongViewRecipe
    seed: int
    colours: Colours
    neighbour: Neighbour | None = None
    """The rank beside this one."""
    _strong: dict[int, View] = field(default_factory=dict, repr=False, compare=False)

    def strong_view(self, number: int) -> View:
        """u_s = CutMix(photometric(u_w)), made once for each number.

        Views of different numbers are drawn independently of each other. With a neighbour all ranks must ask for a
        view together.

        Args:
            number: 0, 1, … below `strong_views` of the base.
        """
        if number not in self._strong:
            images, valid = self.weak.images, self.weak.valid
            neighbour = self.neighbour if self.recipe.cutmix_probability else None
            cutmix = cutmix_of(self.drawn.boxes(number), (images.shape[-2], images.shape[-1]), neighbour)
            changed = photometric(images, self.recipe, self.drawn.photometric(number), self.colours)
            self._strong[number] = View(cutmix(changed), cutmix(valid), cutmix)
        return self._strong[number]
