"""A hub on the loopback interface: the four routes of huggingface.co that a download uses, with faults on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


def git_digest(data: bytes) -> str:
    """SHA-1 of a git blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Hub:
    """One repository. Faults: `cut` maps a file to how many bytes of a body are sent before the connection breaks;
    `broken` files are answered with 500 where a range is asked for; `gated` and `status` answer everything."""

    def __init__(self, repo: str, files: dict[str, bytes]):
        self.repo, self.files = repo, files
        self.asked: list[tuple[str, str | None]] = []  # (file, Range) of every GET of a file
        self.cut: dict[str, int] = {}
        self.broken: set[str] = set()
        self.lies: set[str] = set()  # files whose digest is told wrong
        self.gated = False
        self.status = 0
        self.token: str | None = None
        self.url = ""

    def fetched(self) -> set[str]:
        """Files that were asked for."""
        return {name for name, _ in self.asked}

    def siblings(self) -> list[dict]:
        """The listing: large files as git-lfs has them."""
        found = []
        for name, data in self.files.items():
            one = {"rfilename": name, "size": len(data), "blobId": git_digest(data)}
            if name.endswith((".safetensors", ".bin", ".gguf")):
                digest = hashlib.sha256(data if name not in self.lies else b"other").hexdigest()
                one["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            found.append(one)
        return found


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.token = self.headers.get("Authorization")
            if hub.status:
                return self.reply(hub.status, b"")
            if hub.gated:
                return self.reply(401, b"", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
            if path.startswith(f"/api/models/{hub.repo}/revision/"):
                if path.rpartition("/")[2] not in ("main", COMMIT):
                    return self.reply(404, b"", X_Error_Code="RevisionNotFound")
                about = {"id": hub.repo, "sha": COMMIT, "siblings": hub.siblings()}
                return self.reply(200, json.dumps(about).encode(), Content_Type="application/json")
            before, _, name = path.partition(f"/resolve/{COMMIT}/")
            if before != f"/{hub.repo}" or name not in hub.files:
                return self.reply(404, b"", X_Error_Code="RepoNotFound")
            return self.send_file(name)

        def send_file(self, name: str) -> None:
            data, wanted = hub.files[name], self.headers.get("Range")
            hub.asked.append((name, wanted))
            if wanted and name in hub.broken:
                return self.reply(500, b"")
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            body = data[start:]
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            cut = hub.cut.pop(name, None)
            self.wfile.write(body[:cut])
            if cut is not None:
                self.close_connection = True

    return Handler


@contextmanager
def serving(repo: str, folder: Path, **more: bytes) -> Iterator[Hub]:
    """A hub of the files of a folder."""
    hub = Hub(repo, {p.name: p.read_bytes() for p in folder.iterdir()} | more)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
