"""A Hub on this machine: as much of its protocol as an upload of small files needs."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_test"


@dataclass
class Hub:
    """What the server holds: repositories with their visibility, and the files of their commits."""

    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tokens: set[str | None] = field(default_factory=set)
    refuses: bool = False
    address: str = ""


def serve(hub: Hub) -> ThreadingHTTPServer:
    """A server on a free port that answers for ``hub``; the caller runs and closes it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            repo = self.path.partition("?")[0].removeprefix("/api/models/").partition("/revision/")[0]
            self._note()
            if repo not in hub.private:
                self._answer(404, {"error": "Repository not found"}, code="RepoNotFound")
            else:
                self._answer(200, {"id": repo, "private": hub.private[repo], "sha": "0" * 40, "tags": []})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = self.path.partition("?")[0]
            self._note()
            if hub.refuses:
                self._answer(403, {"error": "this token may not write"})
            elif path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}"
                hub.private[repo] = asked.get("visibility") == "private" or asked.get("private") is True
                self._answer(200, {"url": f"{hub.address}/{repo}", "name": repo, "id": repo})
            elif path == "/api/validate-yaml":
                self._answer(200, {"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                self._answer(200, {"files": files})
            elif "/commit/" in path:
                repo = path.removeprefix("/api/models/").partition("/commit/")[0]
                lines = [json.loads(line) for line in body.splitlines() if line.strip()]
                for line in lines:
                    if line["key"] == "file":
                        data = base64.b64decode(line["value"]["content"])
                        hub.files.setdefault(repo, {})[line["value"]["path"]] = data
                url = f"{hub.address}/{repo}/commit/{'1' * 40}"
                self._answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})
            else:
                self._answer(404, {"error": f"unknown: {path}"})

        def _note(self) -> None:
            hub.tokens.add(self.headers.get("authorization"))

        def _answer(self, status: int, value: Any, *, code: str | None = None) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if code is not None:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    return server
