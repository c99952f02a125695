"""A hub on this machine that has one data set, for those who fetch it by the hub's own client."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

NAME = "someone/some-set"
SHAS = {"main": "a" * 40, "v1.0": "b" * 40}
"""Revision -> its commit."""


@contextmanager
def hub(files: dict[str, dict[str, bytes]]) -> Iterator[str]:
    """Serves a data set.

    Args:
        files: revision -> path -> content.

    Returns:
        The address, for ``HF_ENDPOINT``.
    """
    by_revision = {name: own for revision, own in files.items() for name in (revision, SHAS[revision])}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(*self.found())

        do_HEAD = do_POST = do_GET  # noqa: N815 as the server looks for them

        def found(self) -> tuple[int, dict[str, str], Any]:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(self.path.partition("?")[0])
            if path.startswith(f"/datasets/{NAME}/resolve/"):
                revision, _, file = path.removeprefix(f"/datasets/{NAME}/resolve/").partition("/")
                return self.file(revision, file)
            about, _, rest = path.partition(f"/api/datasets/{NAME}")
            if about or not path.startswith("/api/datasets/"):
                return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
            kind, revision, folder = (*rest.strip("/").split("/", 2), "", "", "")[:3]
            revision = revision or "main"
            if revision not in by_revision:
                return 404, {"X-Error-Code": "RevisionNotFound"}, {"error": f"Invalid rev id: {revision}"}
            return 200, {}, self.listed(kind, folder, by_revision[revision], self.sha(revision))

        def listed(self, kind: str, folder: str, own: dict[str, bytes], sha: str) -> Any:
            if kind != "tree":
                return {"id": NAME, "sha": sha, "siblings": [{"rfilename": path} for path in own]}
            inside = folder and f"{folder}/"
            names = sorted({path[len(inside) :].partition("/")[0] for path in own if path.startswith(inside)})
            there = [inside + name for name in names]
            return [
                {"type": "file", "path": path, "size": len(own[path]), "oid": sha}
                if path in own
                else {"type": "directory", "path": path, "oid": sha}
                for path in there
            ]

        def file(self, revision: str, file: str) -> tuple[int, dict[str, str], Any]:
            if revision not in by_revision or file not in by_revision[revision]:
                return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "Entry not found"}
            sha = self.sha(revision)
            return 200, {"X-Repo-Commit": sha, "ETag": f'"{sha}{file}"'}, by_revision[revision][file]

        def sha(self, revision: str) -> str:
            return SHAS.get(revision, revision)

        def answer(self, status: int, headers: dict[str, str], content: Any) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
