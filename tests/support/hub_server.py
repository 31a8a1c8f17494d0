"""A local server that answers unmodified huggingface_hub as huggingface.co does, and plain file requests besides.

Headers and statuses are those that huggingface_hub 2.4's source reads (``file_download.get_hf_file_metadata``,
``utils/_http.hf_raise_for_status``, ``hf_api.repo_info``). Large files redirect to a second origin, as they do to the CDN.
Fault switches break what a network breaks.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit

CHUNK = 1 << 16
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet")
VALID_TOKEN = "hf_valid"
WEAK_TOKEN = "hf_weak"  # valid, but not on any gated repository's list
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repo:
    """A repository: a folder, one commit, branch main."""

    folder: Path
    commit: str = COMMIT
    gated: bool = False
    private: bool = False


@dataclass
class Faults:
    """What goes wrong. Counters count down."""

    unavailable: int = 0
    """So many requests are answered 503 (-1: all)."""
    drop_after_bytes: int | None = None
    """The connection breaks after so many bytes of a body…"""
    drops: int = 0
    """…so many times."""
    corrupt: int = 0
    """So many bodies have a flipped byte."""
    ignore_ranges: bool = False
    change_etag: bool = False
    bytes_per_second: float | None = None
    """Of all connections together."""
    line: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class Log:
    """Requests seen: (method, path, Range header, Authorization header)."""

    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)

    def paths(self, method: str) -> list[str]:
        """Paths requested by ``method``."""
        return [path for m, path, _, _ in self.requests if m == method]


class HubServer:
    """``endpoint`` is the Hub, ``cdn`` its other origin; ``files`` maps plain paths to contents (any origin)."""

    def __init__(self, tls: ssl.SSLContext | None = None, host: str = "localhost") -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.files: dict[str, bytes] = {}
        self.faults = Faults()
        self.log = Log()
        self._servers = [ThreadingHTTPServer((socket.gethostbyname(host), 0), _handler(self)) for _ in range(2)]
        scheme = "https" if tls else "http"
        for server in self._servers:
            if tls is not None:
                server.socket = tls.wrap_socket(server.socket, server_side=True)
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.endpoint, self.cdn = (f"{scheme}://{host}:{s.server_address[1]}" for s in self._servers)

    def add_model(self, repo_id: str, folder: Path, *, gated: bool = False, private: bool = False) -> None:
        """Publish a model folder."""
        self.repos["models", repo_id] = Repo(folder, gated=gated, private=private)

    def add_dataset(self, repo_id: str, folder: Path, *, gated: bool = False, private: bool = False) -> None:
        """Publish a dataset folder."""
        self.repos["datasets", repo_id] = Repo(folder, gated=gated, private=private)

    def __enter__(self) -> HubServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    return Handler


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.log.requests.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
        faults = self.hub.faults
        if faults.unavailable:
            faults.unavailable -= 1
            return self._error(503, None, "Service Unavailable")
        if (content := self.hub.files.get(path)) is not None:
            return self._content(content, {"ETag": f'"{_sha256(content)[:16]}{"x" if faults.change_etag else ""}"'})
        if match := re.fullmatch(r"/cdn/(models|datasets)/([^/]+/[^/]+)/(.+)", path):
            file = self.hub.repos[match[1], match[2]].folder / match[3]
            return self._content(file.read_bytes(), {"ETag": f'"{_sha256(file.read_bytes())}"'})
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._info(match[1], match[2], match[3] or "main")
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", path):
            return self._tree(match[1], match[2], match[3], match[4] or "")
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            return self._paths_info(match[1], match[2], match[3])
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve("datasets" if match[1] else "models", match[2], match[3], match[4])
        return self._error(404, None, "Not Found")

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _repo(self, kind: str, repo_id: str, revision: str) -> Repo | None:
        """The repository, or None after an error was sent."""
        repo = self.hub.repos.get((kind, repo_id))
        token = self._token()
        if token not in (None, VALID_TOKEN, WEAK_TOKEN):
            self._error(401, None, "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and token != VALID_TOKEN):
            self._error(401 if token is None else 404, "RepoNotFound", "Repository not found")
        elif revision not in ("main", repo.commit):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repo
        return None

    def _info(self, kind: str, repo_id: str, revision: str) -> None:
        repo = self._repo(kind, repo_id, revision)
        if repo is None:
            return
        siblings = []
        for file in sorted(p for p in repo.folder.rglob("*") if p.is_file()):
            data = file.read_bytes()
            sibling: dict[str, object] = {
                "rfilename": file.relative_to(repo.folder).as_posix(),
                "size": len(data),
                "blobId": _blob_id(data),
            }
            if file.suffix in LFS_SUFFIXES:
                sibling["lfs"] = {"size": len(data), "sha256": _sha256(data), "pointerSize": 135}
            siblings.append(sibling)
        body = {
            "id": repo_id,
            "sha": repo.commit,
            "private": repo.private,
            "gated": repo.gated,
            "siblings": siblings,
            "tags": [],
        }
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _tree(self, kind: str, repo_id: str, revision: str, under: str) -> None:
        """What stands below a folder (``HfApi.list_repo_tree``, through which datasets looks for files)."""
        repo = self._repo(kind, repo_id, revision)
        if repo is None:
            return
        if not (folder := repo.folder / under).is_dir():
            return self._error(404, "EntryNotFound", f"{under} does not exist on {revision}")
        deep = "recursive=true" in urlsplit(self.path).query.lower()
        found = [_entry(repo.folder, path) for path in sorted(folder.rglob("*") if deep else folder.iterdir())]
        self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        """Of the paths that the form names those that exist (``HfApi.get_paths_info``)."""
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        repo = self._repo(kind, repo_id, revision)
        if repo is None:
            return
        found = [_entry(repo.folder, repo.folder / path) for path in form["paths"] if (repo.folder / path).exists()]
        self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _resolve(self, kind: str, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(kind, repo_id, revision)
        if repo is None:
            return
        if repo.gated and self._token() != VALID_TOKEN:
            # The API of a gated repository is public; its files are not.
            return self._error(
                401 if self._token() is None else 403, "GatedRepo", f"Access to {repo_id} is restricted."
            )
        file = repo.folder / path
        if not file.is_file():
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": repo.commit})
        data = file.read_bytes()
        if file.suffix in LFS_SUFFIXES:
            return self._send(
                302,
                b"",
                {
                    "Location": f"{self.hub.cdn}/cdn/{kind}/{repo_id}/{path}?Signature=x",
                    "X-Repo-Commit": repo.commit,
                    "X-Linked-Etag": f'"{_sha256(data)}"',
                    "X-Linked-Size": str(len(data)),
                },
            )
        return self._content(data, {"ETag": f'"{_blob_id(data)}"', "X-Repo-Commit": repo.commit})

    def _content(self, data: bytes, headers: dict[str, str]) -> None:
        faults = self.hub.faults
        status, body = 200, data
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if_range = self.headers.get("If-Range")
        if match and not faults.ignore_ranges and if_range in (None, headers.get("ETag")):
            start, end = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            if start >= len(data):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            status, body = 206, data[start : end + 1]
            headers = {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"}
        headers = {**headers, "Accept-Ranges": "bytes"}
        if self.command == "GET" and faults.corrupt and body:
            faults.corrupt -= 1
            body = bytes([body[0] ^ 1]) + body[1:]
        drop = faults.drop_after_bytes
        if self.command == "GET" and faults.drops and drop is not None and len(body) > drop:
            faults.drops -= 1
            self._headers(status, len(body), headers)
            self.wfile.write(body[:drop])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
            return
        self._send(status, body, headers)

    def _error(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        extra = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})
        self._send(status, json.dumps({"error": message}).encode(), {"Content-Type": "application/json", **extra})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._headers(status, len(body), headers)
        if self.command == "HEAD":
            return
        faults = self.hub.faults
        if faults.bytes_per_second is None:
            self.wfile.write(body)
            return
        for start in range(0, len(body), CHUNK):
            with faults.line:
                self.wfile.write(body[start : start + CHUNK])
                time.sleep(CHUNK / faults.bytes_per_second)

    def _headers(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()


def _entry(root: Path, path: Path) -> dict[str, object]:
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": _blob_id(name.encode())}
    data = path.read_bytes()
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": _blob_id(data)}
    if path.suffix in LFS_SUFFIXES:
        entry["lfs"] = {"size": len(data), "oid": _sha256(data), "pointerSize": 135}
    return entry


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _blob_id(data: bytes) -> str:
    """git's blob id: the ETag of a file that is not in LFS."""
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
