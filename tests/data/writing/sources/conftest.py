"""Small data sets in their real layouts, and the command that writes them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskmatch_scale.cli import main as cli
from maskmatch_scale.data.shards.index import ShardIndex
from maskmatch_scale.data.shards.reading import ShardStream
from maskmatch_scale.data.tools.verify import verify


class Tree:
    """Makes image files below a folder; every image differs from every other."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._number = 0

    def image(self, path: str, size: tuple[int, int] = (12, 8), **options: Any) -> bytes:
        self._number += 1
        pixels = np.random.default_rng(self._number).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        return self.save(path, Image.fromarray(pixels), **options)

    def label(self, path: str, values: Any, mode: str | None = None) -> bytes:
        array = np.asarray(values)
        if array.ndim == 0:
            array = np.full((8, 12), array)
        array = array.astype(np.uint16 if array.max() > 255 else np.uint8)
        image = Image.fromarray(array)
        if mode == "P":
            image = image.convert("P")
            image.putdata(array.ravel().tolist())
            image.putpalette([255 - n % 256 for n in range(768)])
        return self.save(path, image)

    def save(self, path: str, image: Image.Image, **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, {".jpg": "JPEG", ".tif": "TIFF"}.get(Path(path).suffix, Path(path).suffix[1:]), **options)
        return self.bytes(path, buffer.getvalue())

    def bytes(self, path: str, data: bytes) -> bytes:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(data)
        return data

    def text(self, path: str, *lines: str) -> Path:
        self.bytes(path, "".join(f"{line}\n" for line in lines).encode())
        return self.root / path


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "source")


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`maskmatch shards write …`: exit code and stderr. One process unless told otherwise."""

    def run(*arguments: object, workers: int = 1) -> tuple[int, str]:
        given = ["maskmatch", "shards", "write", *map(str, arguments), "--workers", str(workers)]
        monkeypatch.setattr("sys.argv", given)
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        return code, capsys.readouterr().err

    return run


class Shards:
    """What a folder holds: samples by stream and key, read as training reads them."""

    def __init__(self, root: Path) -> None:
        import webdataset

        self.index = ShardIndex.load(root)
        assert [str(fault) for fault in verify(root)] == []
        self.streams: dict[str, dict[str, Mapping[str, bytes]]] = {}
        for name, stream in self.index.streams.items():
            found: dict[str, Mapping[str, bytes]] = {}
            read = ShardStream(root, name)
            for shard in stream.shards:
                here = list(webdataset.WebDataset(str(root / shard.file), shardshuffle=False))
                assert len(here) == shard.samples
                for sample in here:
                    assert sample["__key__"] not in found
                    raw = read[len(found)]
                    assert raw.key == sample["__key__"]
                    assert (raw.label is None) != stream.labelled
                    found[sample["__key__"]] = {k: v for k, v in sample.items() if not k.startswith("__")}
            self.streams[name] = found

    def keys(self, stream: str) -> set[str]:
        return set(self.streams[stream])

    def label(self, stream: str, key: str) -> Any:
        with Image.open(io.BytesIO(self.streams[stream][key]["png"])) as image:
            assert (image.format, image.mode) == ("PNG", "L")
            return np.asarray(image)

    def values(self, stream: str) -> dict[str, int]:
        """The value of each label map of one value."""
        found = {}
        for key in self.streams[stream]:
            (value,) = np.unique(self.label(stream, key)).tolist()
            found[key] = value
        return found


@pytest.fixture
def shards() -> type[Shards]:
    return Shards


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Bytes of all files of a folder but the lock."""

    def read(root: Path) -> dict[str, bytes]:
        files = (path for path in root.rglob("*") if path.is_file() and path.name != ".lock")
        return {str(path.relative_to(root)): path.read_bytes() for path in files}

    return read
