"""The seam for new data: what has to be written to add a data source, and that nothing else has to be touched.

A data source is one file in `maskmatch_scale/data/writing/sources/` and its command in `cli/shard_sources.py`. The
first test defines a source from scratch, the second one that lists image files, with its command.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import typer
from PIL import Image

from maskmatch_scale.cli.shards_write import SharedOptions, source_command, write_app
from maskmatch_scale.data.images.decode import decode_image, decode_label
from maskmatch_scale.data.images.encode import encode_image, encode_label
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.data.writing import EncodedSample, StreamItems, write_shards
from maskmatch_scale.data.writing.sources.image_files import ImageFiles
from maskmatch_scale.data.writing.sources.listing import images_below
from maskmatch_scale.data.writing.sources.splits import Pair


class Stripes:
    """Upright stripes: sample n has n bright columns, and its label map says which they are."""

    name = "stripes"
    settings: Mapping[str, object] = {"width": 12}
    classes = ("dark", "bright")
    palette = ((0, 0, 0), (255, 255, 255))
    ignore_index = 255
    streams: Mapping[str, StreamItems] = {
        "labelled": StreamItems(labelled=True, items=[1, 2, 3]),
        "unlabelled": StreamItems(labelled=False, items=[-4, -5]),
    }

    @staticmethod
    def render(item: int) -> EncodedSample:
        label = np.zeros((8, 12), np.uint8)
        label[:, : abs(item)] = 1
        image = encode_image(Image.fromarray(label * 200), "WEBP", lossless=True)
        return EncodedSample(f"stripes-{abs(item)}", image, "webp", encode_label(label) if item > 0 else None)


def test_a_source_is_a_class_that_describes_and_renders_its_samples(tmp_path: Path) -> None:
    index = write_shards(Stripes(), tmp_path, workers=1, progress=False)
    assert (index.source, index.classes, list(index.streams)) == (
        "stripes",
        Stripes.classes,
        ["labelled", "unlabelled"],
    )
    labelled, unlabelled = ShardStream(tmp_path, "labelled"), ShardStream(tmp_path, "unlabelled")
    for number, bright in enumerate((1, 2, 3)):
        sample = labelled[number]
        assert sample.key == f"stripes-{bright}"
        assert sample.label is not None
        assert int(decode_label(sample.label, sample.name, num_classes=2).sum()) == 8 * bright
        assert int((decode_image(sample.image, sample.name) == 200).sum()) == 3 * 8 * bright
    assert [unlabelled[number].key for number in range(2)] == ["stripes-4", "stripes-5"]
    assert all(unlabelled[number].label is None for number in range(2))


def test_a_source_of_image_files_is_a_function_and_its_command(tree, run, shards, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(write_app, "registered_commands", list(write_app.registered_commands))

    @source_command("pictures", "pictures data/pictures")
    def pictures(
        root: Annotated[Path, typer.Argument(help="Folder of pictures.")],
        shared: SharedOptions,
        thumbnails: Annotated[bool, typer.Option("--thumbnails", help="Also those in `thumbnails`.")] = False,
    ) -> ImageFiles:
        """A folder of pictures."""
        leave_out = () if thumbnails else ("thumbnails",)
        listing = {"unlabelled": [Pair(path) for path in images_below(root, leave_out=leave_out)]}
        return ImageFiles("pictures", root, listing, shared.of_source())

    tree.image("one.jpg")
    tree.image("thumbnails/two.jpg")
    assert run("pictures", tree.root, tmp_path / "out")[0] == 0
    assert shards(tmp_path / "out").keys("unlabelled") == {"one"}
    assert run("pictures", tree.root, tmp_path / "all", "--thumbnails")[0] == 0
    assert shards(tmp_path / "all").keys("unlabelled") == {"one", "thumbnails_two"}


@pytest.mark.parametrize("name", ["pictures", "stripes"])
def test_no_source_of_this_file_is_left_behind(run, name) -> None:
    code, err = run(name, "out")
    assert (code, f"unknown source {name!r}" in err) == (2, True)
