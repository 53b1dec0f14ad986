"""Indexes of shards that do not exist, and a server that counts what it sends."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

from maskmatch_scale.data.shards.index import ShardIndex, ShardTable, StreamEntry
from maskmatch_scale.data.shards.stored import write_index

SAMPLES_PER_SHARD = 256
BYTES = 25_000_000


def write_indexes(folder: Path, shards: int) -> dict[str, int]:
    """Write the same shards as a JSON that lists them, with a table in a file of its own, and as a wids list.

    Args:
        folder: where they are written.
        shards: how many.

    Returns:
        Bytes of each kind.
    """
    names = [f"unlabelled-{number:08d}.tar" for number in range(shards)]
    table = ShardTable(
        {
            "file": name,
            "samples": SAMPLES_PER_SHARD,
            "bytes": BYTES,
            "sha256": hashlib.sha256(name.encode()).hexdigest(),
        }
        for name in names
    )
    index = ShardIndex(source="simulated", streams={"unlabelled": StreamEntry(labelled=False, shards=table)})
    for kind in ("json", "table", "wids"):
        (folder / kind).mkdir(parents=True)
    (folder / "json" / "index.json").write_bytes(index.to_json())
    write_index(folder / "table", index)
    listed = [{"url": name, "nsamples": SAMPLES_PER_SHARD, "filesize": BYTES} for name in names]
    (folder / "wids" / "shards.json").write_text(json.dumps({"wids_version": 1, "shardlist": listed}))
    return {kind: sum(path.stat().st_size for path in (folder / kind).iterdir()) for kind in ("json", "table", "wids")}


class Server:
    """Serves a folder at :attr:`url`; :attr:`sent` is how many bytes of files it has sent."""

    def __init__(self, folder: Path) -> None:
        self.sent = 0
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def run(self) -> None:
        """Answer requests until :meth:`close`."""
        self._http.serve_forever()

    def close(self) -> None:
        """Stop."""
        self._http.shutdown()
        self._http.server_close()


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, server: Server, *arguments: Any, **options: Any) -> None:
        self._counts = server
        super().__init__(*arguments, **options)

    def copyfile(self, source: BinaryIO, outputfile: BinaryIO) -> None:  # type: ignore[override]
        while block := source.read(1 << 20):
            outputfile.write(block)
            self._counts.sent += len(block)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server of a folder, closed after the ``with``."""
    server = Server(folder)
    threading.Thread(target=server.run, daemon=True).start()
    try:
        yield server
    finally:
        server.close()
