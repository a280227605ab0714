"""A small Hugging Face hub on this machine: the few endpoints that a download uses, and what can go wrong there."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One model, and how it is served."""

    files: dict[str, bytes]
    repo: str = "acme/tiny"
    token: str | None = None
    """Needed to read files; None: nobody needs one."""
    corrupt: set[str] = field(default_factory=set)
    """Files of which a byte is flipped on the way."""
    break_at: dict[str, int] = field(default_factory=dict)
    """Files that are not served from that byte on: the server answers 404 there."""
    ignores_ranges: bool = False
    """Files come whole, as from some caches where they are compressible."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method and path, range, authorization) of all requests."""
    url: str = ""

    def ranges(self, name: str) -> list[str]:
        """The ranges that were asked for of a file."""
        return [span for path, span, _ in self.requests if path.endswith(f"/resolve/{COMMIT}/{name}")]

    def siblings(self) -> list[dict[str, Any]]:
        found = []
        for name, data in self.files.items():
            entry: dict[str, Any] = {
                "rfilename": name,
                "size": len(data),
                "blobId": hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest(),
            }
            if name.endswith((".safetensors", ".model")):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            found.append(entry)
        return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.hub
        path = self.path.partition("?")[0]
        span = (self.headers.get("Range") or "").removeprefix("bytes=")
        hub.requests.append((f"{self.command} {path}", span, self.headers.get("Authorization")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", path):
            self._info(*match.groups())
        elif path == f"/api/models/{hub.repo}/tree/{COMMIT}":
            found = [each for each in hub.siblings() if "/" not in each["rfilename"]]
            rows = [{"type": "file", "path": s["rfilename"], "size": s["size"], "oid": s["blobId"]} for s in found]
            self._json(200, rows)
        elif match := re.fullmatch(rf"/{hub.repo}/resolve/{COMMIT}/(.+)", path):
            self._file(match[1], span)
        else:
            self._json(404, {"error": "not found"})

    def _info(self, repo: str, revision: str) -> None:
        hub = self.hub
        if repo != hub.repo:
            self._json(401, {"error": "Repository not found"}, "RepoNotFound")
        elif revision not in ("main", COMMIT):
            self._json(404, {"error": "Invalid rev id"}, "RevisionNotFound")
        else:
            self._json(200, {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": hub.siblings()})

    def _file(self, name: str, span: str) -> None:
        hub = self.hub
        if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._json(403, {"error": "gated"}, "GatedRepo")
            return
        data, span = hub.files[name], "" if hub.ignores_ranges else span
        first, last = map(int, span.split("-")) if span else (0, len(data) - 1)
        if last >= hub.break_at.get(name, len(data)):
            self._json(404, {"error": "gone"}, "EntryNotFound")
            return
        part = bytearray(data[first : last + 1])
        if name in hub.corrupt:
            part[0] ^= 1
        self._send(206 if span else 200, bytes(part), {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _json(self, status: int, content: Any, code: str = "") -> None:
        headers = {"Content-Type": "application/json"} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps(content).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body)), "X-Repo-Commit": COMMIT}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve it on a free port of this machine; its address is then `hub.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
