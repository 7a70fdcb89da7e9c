"""The public HTTP interface of the Hugging Face hub, as far as reading a model needs it.

As https://huggingface.co/docs/hub/api describes it and its client asks for it: `/api/models/ID[/revision/R]`,
`/api/models/ID/tree/R` in pages, `/ID/resolve/R/PATH`, which answers small files itself and sends who wants a
large one to where these are kept; ranges; errors in `X-Error-Code`.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_BYTES = 4096  # from here on, a file is kept apart
PAGE_FILES = 2
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(slots=True)
class Repo:
    """Commits by name, and what branches mean."""

    token: str = ""  # who may read it; empty: everybody
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        text = repr((sorted(files.items()), len(self.commits)))
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name], self.branches[branch] = dict(files), name
        return name


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """A server with repositories; what it was asked for is in `asked`, as (path, range)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[tuple[str, str]] = []
        self.breaks: dict[str, int] = {}  # paths whose next answers break off in their middle
        self.lost: set[str] = set()  # paths that the tree has and nobody can get
        self.spoiled: set[str] = set()  # paths whose bytes are others than the tree says
        self.on_resolve: Any = lambda path: None
        self._served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._served.server_port}"
        threading.Thread(target=self._served.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._served.shutdown()
        self._served.server_close()

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        return Handler


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = parts.path
        self.hub.asked.append((unquote(path), self.headers.get("Range", "")))
        if found := re.fullmatch(r"/large/([0-9a-f]{64})/(.+)", path):
            self._send_bytes(*self._large(found[1]), unquote(found[2]), found[1])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path):
            self._api(found[1], found[2] or "revision", found[3] or "main", parse_qs(parts.query))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(found[1], unquote(found[2]), unquote(found[3]))
        else:
            self._refuse(404, "", "no such page")

    # --- what there is --------------------------------------------------------------------------
    def _find(self, name: str, revision: str) -> tuple[Repo, str] | None:
        """Return the repository and the commit; None after an error was sent."""
        repo = self.hub.repos.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo is None or repo.token not in ("", token):
            # The same for both: nobody learns which private models there are.
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, commit

    def _api(self, name: str, what: str, rest: str, query: dict[str, list[str]]) -> None:
        revision, _, folder = rest.partition("/")
        found = self._find(name, unquote(revision))
        if found is None:
            return
        repo, commit = found
        files = repo.commits[commit]
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings})
            return
        folder = unquote(folder)
        entries = _tree(files, folder, query.get("recursive", ["False"])[0].lower() == "true")
        start = int(query.get("cursor", ["0"])[0])
        more = start + PAGE_FILES
        link = (
            f'<{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={more}>; rel="next"'
        )
        headers = {"Link": link} if more < len(entries) else {}
        self._json(entries[start:more], headers)

    def _large(self, digest: str) -> tuple[bytes, str]:
        for repo in self.hub.repos.values():
            for files in repo.commits.values():
                for content in files.values():
                    if hashlib.sha256(content).hexdigest() == digest:
                        return content, digest
        return b"", digest

    def _resolve(self, name: str, revision: str, path: str) -> None:
        found = self._find(name, revision)
        if found is None:
            return
        repo, commit = found
        content = repo.commits[commit].get(path)
        self.hub.on_resolve(path)
        if content is None or path in self.hub.lost:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        if len(content) < LARGE_BYTES:
            self._send_bytes(content, git_sha1(content), path, commit)
            return
        digest = hashlib.sha256(content).hexdigest()
        headers = {
            "Location": f"{self.hub.url}/large/{digest}/{path}",
            "X-Linked-Size": str(len(content)),
            "X-Linked-ETag": f'"{digest}"',
            "X-Repo-Commit": commit,
        }
        self._send(302, b"", headers)

    # --- answers --------------------------------------------------------------------------------
    def _send_bytes(self, content: bytes, tag: str, path: str, commit: str) -> None:
        if path in self.hub.spoiled:
            content = bytes(len(content))
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, wanted = 200, _RANGE.fullmatch(self.headers.get("Range", ""))
        if wanted is not None:
            start, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{last}/{len(content)}"
            status, content = 206, content[start : last + 1]
        breaks = self.hub.breaks.get(path, 0) if wanted is not None and wanted[1] != "0" else 0
        if breaks:
            self.hub.breaks[path] = breaks - 1
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        self._send(status, content, headers)

    def _json(self, body: Any, headers: dict[str, str] | None = None) -> None:
        given = {"Content-Type": "application/json", **(headers or {})}
        self._send(200, json.dumps(body).encode(), given)

    def _refuse(self, status: int, code: str, text: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": text}
        body = json.dumps({"error": text}).encode()
        self._send(status, body, {**headers, "Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """List files and folders as the hub does."""
    entries: dict[str, dict[str, Any]] = {}
    start = f"{folder}/" if folder else ""
    for path, content in sorted(files.items()):
        if not path.startswith(start):
            continue
        names = path[len(start) :].split("/")
        for depth in range(1, len(names)):
            above = start + "/".join(names[:depth])
            if depth == 1 or recursive:
                oid = hashlib.sha1(above.encode()).hexdigest()
                entries[above] = {"type": "directory", "oid": oid, "size": 0, "path": above}
        if len(names) > 1 and not recursive:
            continue
        entry: dict[str, Any] = {
            "type": "file",
            "oid": git_sha1(content),
            "size": len(content),
            "path": path,
        }
        if len(content) >= LARGE_BYTES:
            digest = hashlib.sha256(content).hexdigest()
            pointer = f"version 1\noid sha256:{digest}\nsize {len(content)}\n".encode()
            entry |= {
                "oid": git_sha1(pointer),
                "lfs": {"oid": digest, "size": len(content), "pointerSize": len(pointer)},
            }
        entries[path] = entry
    return list(entries.values())
