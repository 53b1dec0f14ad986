"""A folder served by HTTP from a process of its own: ``python -m benchmarks.loader.server FOLDER BYTES_PER_S``."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_BLOCK = 1 << 16


class _Handler(SimpleHTTPRequestHandler):
    """Serves the files of a folder, whole or from an offset; at most `bytes_per_s` over all answers, if it is given."""

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
        # A client that has enough closes the connection.
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
    """Serve a folder from another process; gives its address.

    Args:
        folder: what to serve.
        root: of the repository.
        bytes_per_s: of all connections together.
    """
    command = [sys.executable, "-m", "benchmarks.loader.server", str(folder), str(bytes_per_s or 0)]
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
        sys.stdin.read()  # returns when the process that started this one has ended


if __name__ == "__main__":
    _serve(sys.argv[1], float(sys.argv[2]))
