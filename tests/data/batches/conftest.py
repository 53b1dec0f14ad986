"""Shards with bad samples."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.reading import ShardStream
from tests.conftest import recipe_maker, rewrite_shard


@pytest.fixture
def spoilt(shapes, tmp_path):
    """Shards whose first labelled sample has a label map of another size, and whose 5th unlabelled one is cut short."""
    root = shutil.copytree(shapes, tmp_path / "spoilt")
    index = ShardIndex.load(root)
    rewrite_shard(root, index.streams["labelled"].shards[0].file, {"labelled-0000.png": small_label()})
    unlabelled = ShardStream(root, "unlabelled", recipe_maker(shapes, tmp_path)().data)
    raw = unlabelled[4]
    rewrite_shard(root, raw.shard, {f"{raw.key}.webp": raw.image[: len(raw.image) // 2]})
    return root


def small_label():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
