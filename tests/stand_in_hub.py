"""A hub of one's own on the loopback interface, for the Hugging Face client: repositories with commits and branches.

It speaks what the client needs to look up a revision and to fetch its files, and remembers what it was asked for.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import reset_sessions


class Hub:
    """Repositories by name (`datasets/owner/name`, `models/owner/name`): for each commit a directory, and branches."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Path]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.requests: list[str] = []

    def commit(self, repository: str, directory: Path, branch: str = "main") -> str:
        """Make the directory the newest commit of a branch, and return its name."""
        name = hashlib.sha1(f"{directory} {len(self.commits)}".encode(), usedforsecurity=False).hexdigest()
        self.commits.setdefault(repository, {})[name] = directory
        self.branches.setdefault(repository, {})[branch] = name
        return name

    @property
    def downloads(self) -> list[str]:
        """The files that were fetched."""
        got = [request for request in self.requests if request.startswith("GET ") and "/resolve/" in request]
        return [request.split("/resolve/")[1].split("/", 1)[1] for request in got]

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content for a path."""
        kind, _, rest = path.removeprefix("/").partition("/")
        if kind == "api":
            name, _, revision = rest.partition("/revision/")
            commit = self._resolve(name, revision or "main")
            if commit is None:
                code = "RevisionNotFound" if name in self.commits else "RepoNotFound"
                return 404, {"X-Error-Code": code}, b""
            files = [p for p in self.commits[name][commit].rglob("*") if p.is_file()]
            names = sorted(p.relative_to(self.commits[name][commit]).as_posix() for p in files)
            about: dict[str, Any] = {"id": name.split("/", 1)[1], "sha": commit}
            return 200, {}, json.dumps({**about, "siblings": [{"rfilename": n} for n in names]}).encode()
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        name = name if name.startswith("datasets/") else f"models/{name}"
        revision, _, file = rest.partition("/")
        commit = self._resolve(name, revision)
        if commit is None or not (self.commits[name][commit] / file).is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = (self.commits[name][commit] / file).read_bytes()
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content

    def _resolve(self, name: str, revision: str) -> str | None:
        commits = self.commits.get(name, {})
        found = self.branches.get(name, {}).get(revision)
        return found or next((commit for commit in commits if commit.startswith(revision)), None)


@contextlib.contextmanager
def running_hub(cache: Path, port: int) -> Iterator[Hub]:
    """A stand-in for the hub that this process's client asks, with an empty cache."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(self.path.partition("?")[0])
            hub.requests.append(f"{self.command} {path}")
            status, headers, content = hub.answer(path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{port}"
        patch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        reset_sessions()
        try:
            yield hub
        finally:
            server.shutdown()
    reset_sessions()
