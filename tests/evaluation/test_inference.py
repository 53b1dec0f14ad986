"""Inference in windows and whole, at scales, mirrored: against the formula, and in bounded memory."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskmatch_scale.evaluation.evaluate import evaluate_split
from maskmatch_scale.evaluation.inference import Inference, WholeImage, described
from maskmatch_scale.evaluation.miou import ConfusionMatrix
from maskmatch_scale.models import build_segmenter
from maskmatch_scale.recipe import DataRecipe, EvaluationRecipe
from tests.conftest import TINY_SEGFORMER, TINY_VIT

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def inference(window_px=(32, 40), patch_px=1, unit_px=1, **keys):
    return Inference(EvaluationRecipe(**keys), window_px, patch_px, unit_px, MEAN, STD, torch.device("cpu"))


def pointwise(images):
    """A segmenter whose prediction of a pixel looks at that pixel alone: windows cannot matter."""
    return torch.cat([images[:, :2] * 3, images[:, :1] - images[:, 1:2]], 1)


def uneven(images):
    """A coarse one that sees where in its input a pixel lies, and the whole of it."""
    place = torch.linspace(-1, 1, images.shape[3]).expand_as(images[:, :1]) * images.mean((1, 2, 3), keepdim=True)
    return F.avg_pool2d(pointwise(images) + torch.cat([place, -place, place * 0], 1), 2)


def picture(height, width, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(256, (3, height, width), generator=draw, dtype=torch.uint8)


def normalised(pixels):
    return (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def whole(blocks, classes=3, size=None):
    blocks = list(blocks)
    size = size or (max(b.rows.stop for b in blocks), max(b.columns.stop for b in blocks))
    found = torch.full((classes, *size), torch.nan)
    for block in blocks:
        found[:, block.rows, block.columns] = block.probabilities
    return found


@pytest.mark.parametrize("size", [(70, 45), (20, 50), (32, 40), (9, 9)])
@pytest.mark.parametrize("mode", ["sliding", "whole"])
@pytest.mark.parametrize("flip", [False, True])
def test_windows_and_mirrors_change_nothing_for_a_pointwise_model(size, mode, flip):
    pixels, calls = picture(*size), []
    how = inference(mode=mode, flip=flip, overlap=0.3, window_batch=2)
    found = whole(how.blocks(lambda x: calls.append(1) or pointwise(x), WholeImage(pixels)))
    torch.testing.assert_close(found, pointwise(normalised(pixels)[None])[0].softmax(0))
    assert len(calls) == how.forwards(size)
    assert how.predict(pointwise, pixels).equal(found.argmax(0))


def test_the_formula_by_hand():
    """Softmax of every window, scale and mirror image, upsampled; then their mean."""
    pixels = picture(48, 32)
    how = inference((32, 32), 4, scales=(0.5, 1.0, 1.3), flip=True, overlap=0.5, window_batch=3)
    image, total = normalised(pixels), torch.zeros(3, 48, 32)
    for top in (0, 16):
        for side in (16, 32, 40):  # 1.3 * 32 = 41.6 px, in whole patches of 4 px
            window = F.interpolate(image[None, :, top : top + 32], size=(side, side), mode="bilinear")
            for logits in (uneven(window), uneven(window.flip(3)).flip(3)):
                total[:, top : top + 32] += F.interpolate(logits, size=(32, 32), mode="bilinear")[0].softmax(0)
    torch.testing.assert_close(whole(how.blocks(uneven, WholeImage(pixels))), total / total.sum(0))
    assert how.forwards((48, 32)) == 6


def test_whole_images_are_padded_to_whole_patches_with_the_mean_colour():
    pixels, seen = picture(30, 45), []
    how = inference((28, 28), 14, mode="whole")
    found = whole(how.blocks(lambda x: seen.append(x) or pointwise(x), WholeImage(pixels)))
    assert found.shape == (3, 30, 45)
    (given,) = seen
    assert given.shape == (1, 3, 42, 56)
    assert given[0, :, :30, :45].equal(normalised(pixels))
    assert given[0, :, 30:].eq(0).all()
    assert given[0, :, :, 45:].eq(0).all()


@pytest.mark.parametrize("family", ["segformer", "vit"])
@pytest.mark.parametrize("size", [(97, 131), (33, 20), (5, 7)])
@pytest.mark.parametrize("mode", ["sliding", "whole"])
def test_images_of_any_size_are_predicted_by_both_families(family, size, mode):
    name, options = {
        "segformer": ("transformers/segformer-b0", TINY_SEGFORMER), "vit": ("timm/vit_tiny_patch16_224", TINY_VIT)
    }[family]  # fmt: skip
    segmenter = build_segmenter(name, 3, backbone_options=options, context=False).eval()
    how = inference((64, 64), segmenter.patch_px, segmenter.unit_px, mode=mode, scales=(0.5, 1.0), flip=True)
    found = whole(how.blocks(segmenter, WholeImage(picture(*size))))
    assert found.shape == (3, *size)
    torch.testing.assert_close(found.sum(0), torch.ones(size))


@dataclass
class Striped:
    """An image that is nowhere in memory."""

    size_px: tuple[int, int]
    largest: int = 0

    def read(self, rows, columns):
        assert 0 <= rows.start < rows.stop <= self.size_px[0]
        assert 0 <= columns.start < columns.stop <= self.size_px[1]
        place = torch.arange(rows.start, rows.stop)[:, None] * 3 + torch.arange(columns.start, columns.stop)
        return (place % 251).to(torch.uint8).expand(3, -1, -1)


class Largest(TorchDispatchMode):
    """Notes the largest memory of a tensor, in bytes."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.nbytes = max([self.nbytes, *(tensor.untyped_storage().nbytes() for tensor in tensors)])
        return result


def test_memory_does_not_grow_with_the_height_of_an_image():
    how = inference((32, 32), overlap=0.25, window_batch=2)
    largest = []
    for height in (100, 4000):
        image, rows = Striped((height, 300)), 0
        with Largest() as noted:
            for block in how.blocks(pointwise, image):
                rows = max(rows, block.rows.stop)
        assert rows == height
        largest.append(noted.nbytes)
    assert max(largest) <= 4 * 3 * 300 * 12  # a strip of the overlap, which evenly spread windows make a little higher


def test_ranks_together_give_the_matrix_of_one(shapes):
    for keys in ({}, {"mode": "whole", "flip": True}, {"scales": (0.5, 1.0)}):
        how, counts = inference((64, 64), **keys), ConfusionMatrix(3)
        assert evaluate_split(uneven, DataRecipe(root=str(shapes)), "val", how, counts) == 5
        parts = []
        for rank in range(2):
            parts.append(ConfusionMatrix(3))
            evaluate_split(uneven, DataRecipe(root=str(shapes)), "val", how, parts[-1], (rank, 2))
        assert (parts[0].counts + parts[1].counts).equal(counts.counts)


def test_it_is_said_in_words():
    assert described(EvaluationRecipe(), (64, 96)) == "sliding windows of 64×96 px overlapping by at least 25%"
    keys = EvaluationRecipe(mode="whole", scales=(0.5, 1.0), flip=True)
    assert described(keys, (64, 96)) == "whole images, at scales 0.5, 1, and their mirror images"
