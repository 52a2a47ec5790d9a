"""A stand-in for the Hugging Face hub on loopback: data sets as dictionaries of files."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """Its data sets, one revision each, and the requests that it got."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.sets: dict[str, Files] = {}
        self.private: set[str] = set()
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, authorization

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> set[str]:
        """Paths of the files of data sets whose contents were sent."""
        paths = (path for method, path, _ in self.requests if method == "GET")
        return {
            path.split("/resolve/")[1].split("/", 1)[1] for path in paths if "/resolve/" in path
        }


def commit(files: Files) -> str:
    content = json.dumps({name: hashlib.sha1(data).hexdigest() for name, data in files.items()})
    return hashlib.sha1(content.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self._path()
        if match := re.fullmatch(r"/datasets/(\w+/\w+)/resolve/[^/]+/(.+)", path):
            files = self.server.sets[match[1]]
            data = files[match[2]]
            return self._send(data, ETag=f'"{commit({"": data})}"', X_Repo_Commit=commit(files))
        match = re.fullmatch(r"/api/datasets/(\w+/\w+)(?:/(revision|tree)/[^/]+)?", path)
        if match is None or (files := self.server.sets.get(match[1])) is None:
            return self._json({"error": "not found"}, status=404, X_Error_Code="RepoNotFound")
        entries = [
            {"type": "file", "path": name, "rfilename": name, "size": len(data), "oid": name}
            for name, data in files.items()
        ]
        info = {"id": match[1], "sha": commit(files), "siblings": entries}
        return self._json(entries if match[2] == "tree" else info)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        path, body = self._path(), self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            address = f"{self.server.address}/datasets/{name}"
            if name in self.server.sets:
                return self._json({"url": address}, status=409)
            self.server.sets[name] = {}
            self.server.private |= {name} if asked["visibility"] == "private" else set()
            return self._json({"url": address})
        match = re.fullmatch(r"/api/datasets/(\w+/\w+)/(preupload|commit)/main", path)
        assert match, path
        if match[2] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._json({"files": [
                {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
            ]})  # fmt: skip
        files = self.server.sets[match[1]]
        for entry in map(json.loads, body.splitlines()):
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "deletedFile":
                del files[entry["value"]["path"]]
        address = f"{self.server.address}/datasets/{match[1]}/commit/{commit(files)}"
        return self._json({"commitUrl": address, "commitOid": commit(files)})

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers["Authorization"]))
        return path

    def _json(self, content: Any, **options: Any) -> None:
        self._send(json.dumps(content).encode(), Content_Type="application/json", **options)

    def _send(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """Nothing: tests look at `Hub.requests`."""


@contextmanager
def serving() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
