"""A reward server on a port of this machine, with replies that a test sets."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.judge_server import Reply

VERSION = {"reward": "width", "rule": "one"}


def answers(content: Any, *, status: int = 200, delay: float = 0.0) -> Reply:
    """A reply in JSON; bytes are sent as they are."""
    return Reply(content if isinstance(content, bytes) else json.dumps(content).encode(), status, delay=delay)


def scores(*rows: Any, version: Any = VERSION) -> Reply:
    """An answer to ``POST``."""
    return answers({"version": version, "scores": list(rows)})


def halves(payload: dict[str, Any]) -> Reply:
    """A half for every image."""
    return scores(*({"value": 0.5, "details": {"seen": prompt}} for prompt in payload["prompts"]))


class RewardServer:
    """``replies`` are used up first, one per request for scores; then ``otherwise`` answers."""

    def __init__(self) -> None:
        self.info = answers({"version": VERSION, "scale": [0, 1]})
        self.replies: deque[Reply] = deque()
        self.otherwise: Callable[[dict[str, Any]], Reply] = halves
        self.seen: list[dict[str, Any]] = []
        self.headers: list[str] = []
        self.at_once = self.most_at_once = 0
        self.drip = 0.0
        """Seconds between two bytes of an answer."""
        self.lock, self.closing = threading.Lock(), threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def _handler(server: RewardServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.headers.append(str(self.headers))
            self.send(server.info)

        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.seen.append(payload)
                server.headers.append(str(self.headers))
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
                reply = server.replies.popleft() if server.replies else server.otherwise(payload)
            server.closing.wait(reply.delay)
            with server.lock:
                server.at_once -= 1
            self.send(reply)

        def send(self, reply: Reply) -> None:
            if reply.hang_up:
                self.close_connection = True
                return
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                if not server.drip:
                    self.wfile.write(reply.body)
                for byte in reply.body if server.drip else b"":
                    self.wfile.write(bytes([byte]))
                    server.closing.wait(server.drip)
            except (BrokenPipeError, ConnectionResetError):  # the client has stopped waiting
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
