"""Shard folders and recipes that tests of several rooms share."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from PIL import Image

from maskmatch_scale.data.writing import EncodedSample, StreamItems, write_shards
from maskmatch_scale.files import sha256
from maskmatch_scale.recipe import Recipe, parse_recipe
from tests.data import s3_server as s3_servers

# An example's time says more of what else the machine does than of the code: no test has a limit of time.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


@pytest.fixture(autouse=True, scope="session")
def _no_files_in_the_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What runs keep by default under ~/.cache goes into a folder of the tests; matplotlib keeps its list of fonts."""
    with pytest.MonkeyPatch.context() as patch:
        if "MPLCONFIGDIR" not in os.environ:
            patch.setenv("MPLCONFIGDIR", str(Path.home() / ".cache/matplotlib"))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("home-cache")))
        yield


@dataclass(frozen=True)
class ShapesSource:
    """Images of 96 × 128 px: a noisy ground with a bright square and a striped disc, labelled pixel by pixel."""

    counts: Mapping[str, int]
    shards: Mapping[str, int] = field(default_factory=dict)
    name: str = "shapes"
    classes: tuple[str, ...] = ("ground", "square", "disc")
    palette: tuple[tuple[int, int, int], ...] = ((0, 0, 0), (255, 0, 0), (0, 0, 255))
    ignore_index: int = 255

    @property
    def settings(self) -> Mapping[str, object]:
        return {"counts": dict(self.counts)}

    @property
    def streams(self) -> Mapping[str, StreamItems]:
        return {
            name: StreamItems(name != "unlabelled", [(name, number) for number in range(count)])
            for name, count in self.counts.items()
        }

    @staticmethod
    def render(item: tuple[str, int]) -> EncodedSample:
        name, number = item
        image, label = draw_shapes(sum(name.encode()) * 1000 + number)
        return EncodedSample(f"{name}-{number:04d}", _png(image), "webp", None if name == "unlabelled" else _png(label))


def draw_shapes(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 image (96, 128, 3) and label (96, 128)."""
    draw = np.random.default_rng(seed)
    image = draw.integers(60, 120, (96, 128, 3))
    label = np.zeros((96, 128), np.uint8)
    top, left, side = draw.integers(0, 50), draw.integers(0, 60), draw.integers(20, 40)
    image[top : top + side, left : left + side] += 110
    label[top : top + side, left : left + side] = 1
    y, x = np.mgrid[:96, :128]
    disc = (y - draw.integers(30, 70)) ** 2 + (x - draw.integers(40, 100)) ** 2 < draw.integers(10, 22) ** 2
    image[disc] = np.where((x[disc] // 3 % 2 == 0)[:, None], 20, 200)
    label[disc] = 2
    label[:2] = 255
    return image.clip(0, 255).astype(np.uint8), label


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG" if pixels.ndim == 2 else "WEBP", lossless=True)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real shard folder: 8 labelled, 24 unlabelled, 5 dev and 5 val samples in several shards."""
    root = tmp_path_factory.mktemp("shapes")
    source = ShapesSource({"labelled": 8, "unlabelled": 24, "dev": 5, "val": 5})
    write_shards(source, root, workers=1, samples_per_shard=4, progress=False)
    return root


def rewrite_shard(root: Path, file: str, changed: Mapping[str, bytes | None]) -> None:
    """Give members of a shard other bytes (None: leave them out), and its index entry the new size and checksum."""
    with tarfile.open(root / file) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    assert changed.keys() <= members.keys()
    with tarfile.open(root / file, "w") as tar:
        for name, data in {**members, **changed}.items():
            if data is not None:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    content = json.loads((root / "index.json").read_text())
    for stream in content["streams"].values():
        for shard in stream["shards"]:
            if shard["file"] == file:
                shard |= {"bytes": (root / file).stat().st_size, "sha256": sha256(root / file)}
    (root / "index.json").write_text(json.dumps(content))


TINY_SEGFORMER = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 16, 16, 24],
    "num_attention_heads": [1, 2, 2, 3],
    "mlp_ratios": [2, 2, 2, 2],
    "decoder_hidden_size": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "classifier_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
}
"""SegformerConfig of a model that trains in milliseconds a step."""

TINY_VIT = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 16}
"""timm options likewise."""

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")),
    reason="no C++ compiler, which torch.compile needs on a CPU",
)


@pytest.fixture
def make_recipe(shapes: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A small complete recipe; sections given as keyword arguments are merged over it."""
    return recipe_maker(shapes, tmp_path)


def recipe_maker(shapes: Path, folder: Path) -> Callable[..., Recipe]:
    """What `make_recipe` is, for fixtures of another scope."""

    def make(**sections: Mapping[str, Any]) -> Recipe:
        content: dict[str, dict[str, Any]] = {
            "data": {"root": str(shapes), "crop_px": 64, "workers": 0},
            "model": {"backbone": "transformers/segformer-b0", "backbone_options": TINY_SEGFORMER},
            "method": {"scales": [1.0], "threshold": 0.3},
            "engine": {"micro_batch": 2, "threads": 1},
            "run": {"dir": str(folder / "run"), "steps": 3, "log_every": 1},
        }
        for name, section in sections.items():
            # Options of one backbone mean nothing to another.
            content[name] = dict(section) if "backbone" in section else content.get(name, {}) | dict(section)
        return parse_recipe(content)

    return make


@dataclass
class SmallDisk:
    """A real file system of few bytes, mounted at ``path``: full when a test says so, or read-only."""

    path: Path

    def fill(self, leave: int = 0) -> None:
        """Fill it, and leave room for ``leave`` bytes, in whole pages."""
        free = os.statvfs(self.path).f_bavail * os.statvfs(self.path).f_bsize
        (self.path / ".filling").write_bytes(b"x" * (free - leave))

    def free(self) -> None:
        """Make room again."""
        (self.path / ".filling").unlink()

    def make_read_only(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", self.path], check=True)


@pytest.fixture
def maskmatch(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int | str, str, str]]:
    """(exit code, stdout, stderr) of `maskmatch …` in this process."""
    from maskmatch_scale.cli import main as cli

    def run(*arguments: object) -> tuple[int | str, str, str]:
        monkeypatch.setattr(sys, "argv", ["maskmatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., SmallDisk]]:
    """Mounts a tmpfs: `small_disk(kib=64, options="usrquota")`."""
    mounted: list[Path] = []

    def mount(kib: int = 64, options: str = "") -> SmallDisk:
        path = tmp_path / f"disk-{len(mounted)}"
        path.mkdir()
        wanted = ",".join(filter(None, (f"size={kib}k", options)))
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", wanted, "tmpfs", path], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"no tmpfs ({wanted}) can be mounted: {done.stderr.decode().strip()}")
        mounted.append(path)
        return SmallDisk(path)

    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("needs root, to mount a small tmpfs")
    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """``HOST:PORT`` of a real S3 server."""
    if s3_servers.moto_server() is None:
        pytest.skip(s3_servers.MISSING)
    with s3_servers.running() as server:
        yield server
