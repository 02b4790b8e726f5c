"""A Hub on this machine that has data sets, for `datasets.load_dataset` as it is.

Real: the client, unpatched, and what it sends and reads over HTTP to look a data set up, to list
its files and to download them. Not real: there is one revision, everything is public, nothing can
be written, and the Hub's server of converted Parquet files is missing.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Files = dict[str, bytes]
COMMIT = "0" * 40
NAME = r"/(?:api/)?datasets/([\w.-]+/[\w.-]+)"


class Handler(BaseHTTPRequestHandler):
    """Answers from `data_sets`, the files of each data set by its name."""

    protocol_version = "HTTP/1.1"
    data_sets: dict[str, Files]

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = re.match(NAME, self.path)
        files = self.data_sets.get(found[1]) if found else None
        if found is None or files is None:
            return self._send(b"", 404, {"X-Error-Code": "RepoNotFound"})
        rest = self.path[found.end() :].partition("?")[0]
        if not self.path.startswith("/api"):
            return self._file(files, rest.removeprefix("/resolve/").partition("/")[2])
        self._send(json.dumps(_about(found[1], files, rest, body)).encode())

    def _file(self, files: Files, path: str) -> None:
        if path not in files:
            return self._send(b"", 404, {"X-Error-Code": "EntryNotFound"})
        etag = hashlib.sha1(files[path]).hexdigest()
        self._send(files[path], headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _about(name: str, files: Files, rest: str, body: bytes) -> object:
    if "/paths-info/" in rest:
        return [_entry(path, data) for path, data in files.items() if path.encode() in body]
    if "/tree/" in rest:
        return _listing(files, rest.partition("/tree/")[2].partition("/")[2])
    siblings = [{"rfilename": path} for path in files]
    return {"_id": "0", "id": name, "sha": COMMIT, "siblings": siblings, "private": False}


def _entry(path: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


def _listing(files: Files, folder: str) -> list[dict[str, object]]:
    """The files and folders that lie in a folder."""
    start = f"{folder}/" if folder else ""
    inside = {path: data for path, data in files.items() if path.startswith(start)}
    deeper = {path[len(start) :].partition("/")[0] for path in inside if "/" in path[len(start) :]}
    return [
        *({"type": "directory", "path": start + name, "oid": COMMIT} for name in sorted(deeper)),
        *(_entry(path, data) for path, data in inside.items() if "/" not in path[len(start) :]),
    ]


@contextmanager
def dataset_hub(data_sets: dict[str, Files], home: Path) -> Iterator[dict[str, str]]:
    """Serve data sets; yields the environment that sends a new process here.

    Args:
        data_sets: the files of each, by the name of the data set.
        home: an empty folder for the client's cache.
    """
    handler = type("Here", (Handler,), {"data_sets": data_sets})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
    finally:
        server.shutdown()
        server.server_close()
