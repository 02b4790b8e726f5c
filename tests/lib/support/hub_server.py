"""A Hub on this machine, for the real client: `huggingface_hub` is sent to it by `HF_ENDPOINT`.

Real: the client, unpatched, in a process of its own, and every byte it sends and reads over HTTP:
making repositories and branches, asking whether a card's metadata are valid, asking how files are
to be uploaded, git-LFS's batch call and the upload to a storage host of its own that is handed no
token, commits as lines of JSON, pull requests, listings, and resolving files by HEAD and GET with
commit hash, etag and size, large ones by a redirect to the storage host. Also, as on the Hub: the
status codes and `X-Error-*` headers, a private repository looks to strangers like none at all, and
a commit with an invalid card is refused.

Not real: repositories live in memory and know no git; tokens are names in a table; large files go
by git-LFS and never by Xet, the chunked protocol that the client prefers where `hf_xet` is
installed (`HF_HUB_DISABLE_XET=1` turns it off, as `environment` does); uploads in parts,
resuming a download, caching redirects, rate limits and gated repositories are missing. The rules
for metadata are those whose messages are publicly known, far fewer than the Hub's. The client
recognises a stranger's 401 by an address with https; here the header `X-Error-Code` says it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from support.hub_api import Answer, Hub, Refused, Request, answer, store


def handler(hub: Hub, reply: Callable[[Hub, Request], Answer]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            parts = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            request = Request(
                self.command,
                parts.path,
                parse_qs(parts.query),
                body,
                hub.tokens.get(token),
                "Authorization" in self.headers,
            )
            hub.requests.append(f"{self.command} {parts.path}")
            try:
                result = reply(hub, request)
            except Refused as refused:
                result = refused.answer()
            self.send(result)

        do_GET = do_HEAD = do_POST = do_PUT = handle_any

        def send(self, result: Answer) -> None:
            is_bytes = isinstance(result.body, bytes)
            body = result.body if is_bytes else json.dumps(result.body).encode()
            self.send_response(result.status)
            kind = "application/octet-stream" if is_bytes else "application/json"
            for name, value in {"Content-Type": kind, **result.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def local_hub(tokens: dict[str, str]) -> Iterator[Hub]:
    """Run a Hub and its storage host on free ports until the block ends."""
    hub = Hub(tokens)
    servers = [
        ThreadingHTTPServer(("127.0.0.1", 0), handler(hub, reply)) for reply in (answer, store)
    ]
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{s.server_port}" for s in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
