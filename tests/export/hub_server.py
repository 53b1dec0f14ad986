"""A real HTTP server with the few endpoints of the Hugging Face Hub that a push uses.

It keeps what is committed in memory. Files of more than a kilobyte go the way of large ones (Git LFS).
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_thetokenofthistest"


class HubServer:
    """Serves at :attr:`url` while it is entered.

    Args:
        failing: path that is answered with ``status``: "create" or "commit".
        status: of HTTP.
    """

    def __init__(self, failing: str = "", status: int = 500) -> None:
        self.failing, self.status = failing, status
        self.repositories: dict[str, dict[str, Any]] = {}
        """What was asked for when a repository was made, by its name."""
        self.files: dict[str, bytes] = {}
        """Contents of the last commit, by path."""
        self.large: dict[str, bytes] = {}
        """Contents of large files, by SHA-256."""
        self.commits = 0
        self.unknown: list[str] = []
        """POST requests that no endpoint answers; those by GET are for what is optional."""

    def __enter__(self) -> HubServer:
        outer = self

        class Handler(_Handler):
            hub = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *_: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        if urlsplit(self.path).path.endswith("/tree/main"):
            files = self.hub.files.items()
            self._answer(200, [{"type": "file", "path": p, "size": len(f), "oid": "0" * 40} for p, f in files])
        else:
            self._answer(404, {"error": "Not found"})

    def do_PUT(self) -> None:
        content = self._body()
        sha = hashlib.sha256(content).hexdigest()
        assert self.path == f"/upload/{sha}"
        self.hub.large[sha] = content
        self._answer(200, {})

    def do_POST(self) -> None:
        hub, path, body = self.hub, urlsplit(self.path).path, self._body()
        if path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif not path.endswith("/objects/batch") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif (hub.failing == "create" and path.endswith("create")) or (hub.failing == "commit" and "/commit/" in path):
            self._answer(hub.status, {"error": f"failing, with {self.headers['Authorization']}"})
        elif path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
            status = 409 if name in hub.repositories else 200
            hub.repositories.setdefault(name, wanted)
            self._answer(status, {"url": f"{hub.url}/{name}", "name": name})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self._answer(200, {"files": [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] > 1024 else "regular", "shouldIgnore": False}
                for f in files
            ]})  # fmt: skip
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{hub.url}/upload/{wanted['oid']}", "header": {}}}}
                for wanted in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif path.endswith("/commit/main"):
            self._commit([json.loads(line) for line in body.splitlines()])
            repository = path.removeprefix("/api/models/").removesuffix("/commit/main")
            url = f"{hub.url}/{repository}/commit/{'0' * 40}"
            self._answer(200, {"success": True, "commitOid": "0" * 40, "commitUrl": url, "hookOutput": ""})
        else:
            hub.unknown.append(f"POST {self.path}")
            self._answer(404, {"error": "Not found"})

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        self.hub.commits += 1
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                assert value["encoding"] == "base64"
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del self.hub.files[value["path"]]
            elif line["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.large[value["oid"]]

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, content: dict[str, Any] | list[dict[str, Any]]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
