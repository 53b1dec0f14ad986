"""A run and its export, and pictures to predict with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.export.write import export_run
from maskmatch_scale.runs.data import describe_data
from maskmatch_scale.runs.model import build_student
from tests.checkpoints.made_up import cut, write
from tests.conftest import draw_shapes, recipe_maker
from tests.predict.environment import without_ranks

PALETTE = ((0, 0, 0), (255, 0, 0), (0, 0, 255))


@pytest.fixture(scope="session")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a checkpoint of random weights, other ones for teacher and student."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    recipe = recipe_maker(shapes, folder)(run={"dir": str(folder), "steps": 4})
    index = ShardIndex.load(recipe.data.root)
    segmenter = build_student(recipe, index, pretrained=False)
    draws, state = torch.Generator().manual_seed(3), {}
    image = torch.from_numpy(draw_shapes(5)[0]).permute(2, 0, 1)[None] / 255 - 0.5
    for kind in ("ema", "student"):
        for name, value in segmenter.state_dict().items():
            if value.is_floating_point() and "running" not in name:
                value += torch.randn(value.shape, generator=draws) * 0.2
        with torch.no_grad():  # so that each class is predicted somewhere
            logits = segmenter.eval()(image)
            segmenter.head.classifier.weight /= logits.std()
            segmenter.head.classifier.bias -= segmenter(image).mean((0, 2, 3))
        state |= {f"{kind}/{name}": value.clone() for name, value in segmenter.state_dict().items()}
    assert write(folder / "checkpoints", 4, cut(state, {}, 1)).error is None
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "data.json").write_text(describe_data(recipe, index).model_dump_json())
    return folder


@pytest.fixture(scope="session")
def export(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of `run`."""
    out = tmp_path_factory.mktemp("exports") / "mine"
    export_run(run, out)
    return out


@pytest.fixture(autouse=True)
def _a_single_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training in this process sets RANK and others, by which predict would take a share."""
    for name in list(os.environ):
        if name not in without_ranks():
            monkeypatch.delenv(name)


@pytest.fixture
def photo() -> Callable[..., np.ndarray]:
    """RGB (H, W, 3) of shapes, repeated to any size: `photo(seed, height, width)`."""

    def draw(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
        image, _ = draw_shapes(seed)
        return np.tile(image, (-(-height // 96), -(-width // 128), 1))[:height, :width].copy()

    return draw


@pytest.fixture
def photos(tmp_path: Path, photo: Callable[..., np.ndarray]) -> Path:
    """A folder with a.png, b.jpg, sub/a.png and sub/c.webp, of several sizes, some larger than a window."""
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    Image.fromarray(photo(1)).save(root / "a.png")
    Image.fromarray(photo(2, 70, 150)).save(root / "b.jpg", quality=95)
    Image.fromarray(photo(3, 40, 50)).save(root / "sub" / "a.png")
    Image.fromarray(photo(4)).save(root / "sub" / "c.webp", lossless=True)
    return root
