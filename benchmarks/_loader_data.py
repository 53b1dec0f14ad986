"""What the benchmark of the loader reads: seeded photo-like JPEGs in the package's own shards, also served by HTTP."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskmatch_scale.data.writing import EncodedSample, StreamItems

_SCENES = 16
_BLOCK = 1 << 16


@dataclass(frozen=True)
class PhotoSource:
    """Unlabelled JPEGs of photo-like images: smooth shapes of several sizes, grain, other colours in each."""

    count: int
    width: int
    height: int
    quality: int = 85
    name: str = "photos"
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    ignore_index: int = 255

    @property
    def settings(self) -> Mapping[str, object]:
        """What decides the bytes."""
        return {"count": self.count, "width": self.width, "height": self.height, "quality": self.quality}

    @property
    def streams(self) -> Mapping[str, StreamItems]:
        """One stream without labels."""
        items = [(number, self.width, self.height, self.quality) for number in range(self.count)]
        return {"unlabelled": StreamItems(False, items)}

    @staticmethod
    def render(item: tuple[int, int, int, int]) -> EncodedSample:
        """A piece of one of a few scenes, brighter or darker, with grain of its own."""
        number, width, height, quality = item
        draw = np.random.default_rng(number)
        scene = _scene(int(draw.integers(_SCENES)), width, height)
        top, left = int(draw.integers(height // 2 + 1)), int(draw.integers(width // 2 + 1))
        image = scene[top : top + height, left : left + width, draw.permutation(3)] * draw.uniform(0.7, 1.2)
        image = image + draw.normal(0, 9, (height, width, 1)).astype(np.float32)
        buffer = io.BytesIO()
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=quality)
        return EncodedSample(f"photo-{number:06d}", buffer.getvalue(), "jpg")


@lru_cache(maxsize=2 * _SCENES)
def _scene(number: int, width: int, height: int) -> NDArray[np.float32]:
    draw = np.random.default_rng(1000 + number)
    width, height = width + width // 2, height + height // 2
    scene = np.full((height, width, 3), 120, np.float32)
    for cells, contrast in ((4, 60), (12, 35), (40, 20), (160, 14)):
        coarse = draw.normal(0, contrast, (3, max(1, cells * height // width), cells)).astype(np.float32)
        planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC) for plane in coarse]
        scene += np.stack([np.asarray(plane) for plane in planes], axis=-1)
    return scene


class _Handler(SimpleHTTPRequestHandler):
    """A folder's files, whole or from an offset; all answers together at most `bytes_per_s`, if it is given."""

    protocol_version = "HTTP/1.1"
    bytes_per_s: float | None = None
    _link = threading.Lock()

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        size, start, stop = path.stat().st_size, 0, path.stat().st_size
        asked = self.headers.get("Range", "")
        if asked.startswith("bytes="):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(size, int(last) + 1) if last else size
        self.send_response(HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        # Who has enough hangs up.
        with path.open("rb") as file, suppress(ConnectionError):
            file.seek(start)
            while start < stop and (block := file.read(min(_BLOCK, stop - start))):
                if self.bytes_per_s is not None:
                    with self._link:
                        time.sleep(len(block) / self.bytes_per_s)
                self.wfile.write(block)
                start += len(block)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path, root: Path, bytes_per_s: float | None = None) -> Iterator[str]:
    """The address under which another process serves a folder.

    Args:
        folder: what to serve.
        root: of the repository.
        bytes_per_s: of all connections together.
    """
    command = [sys.executable, "-m", "benchmarks._loader_data", str(folder), str(bytes_per_s or 0)]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.kill()


def _serve(folder: str, bytes_per_s: float) -> None:
    class Handler(_Handler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=folder)  # type: ignore[arg-type]

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    Handler.bytes_per_s = bytes_per_s or None
    with Server(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        sys.stdin.read()  # ends with whoever asked for it


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]))
