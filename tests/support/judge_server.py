"""A judge's endpoint on a port of this machine, with replies that a test sets."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "UnifiedReward-2.0-qwen3vl-8b"


@dataclass(frozen=True)
class Reply:
    """What the endpoint sends back; ``hang_up`` closes the connection without a word."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    hang_up: bool = False


@dataclass(frozen=True)
class Seen:
    """One request for a judgement."""

    payload: dict[str, Any]
    authorization: str | None
    headers: str


def lines(alignment: Any, coherence: Any, style: Any) -> str:
    """An answer as UnifiedReward gives it."""
    return f"Alignment Score (1-5): {alignment}\nCoherence Score (1-5): {coherence}\nStyle Score (1-5): {style}"


def says(text: Any, *, finish: str = "stop", delay: float = 0.0) -> Reply:
    """A chat answer with this content."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return Reply(json.dumps({"object": "chat.completion", "choices": [choice]}).encode(), delay=delay)


def fails(status: int, *, message: str = "", headers: Mapping[str, str] | None = None) -> Reply:
    """An error as vLLM words it; another attempt is welcome at once unless the headers say otherwise."""
    body = json.dumps({"error": {"message": message, "code": status}}).encode()
    return Reply(body, status, {"retry-after-ms": "1"} if headers is None else headers)


class JudgeServer:
    """``replies`` are used up first, one per request; then ``otherwise`` answers, given the request's text."""

    def __init__(self) -> None:
        self.replies: deque[Reply] = deque()
        self.otherwise: Callable[[str], Reply] = lambda text: says(lines(3.5, 4.0, 2.25))
        self.models = Reply(json.dumps({"object": "list", "data": [{"id": MODEL}]}).encode())
        self.seen: list[Seen] = []
        self.model_requests = 0
        self.model_headers = ""
        self.at_once = 0
        self.most_at_once = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def next_reply(self, text: str) -> Reply:
        with self.lock:
            return self.replies.popleft() if self.replies else self.otherwise(text)

    def close(self) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def _handler(server: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            server.model_requests += 1
            server.model_headers = str(self.headers)
            known = self.path == "/v1/models"
            self.send(server.models if known else fails(404))

        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.seen.append(Seen(payload, self.headers["Authorization"], str(self.headers)))
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            if self.path == "/v1/chat/completions":
                reply = server.next_reply(payload["messages"][0]["content"][-1]["text"])
            else:
                reply = fails(404)
            server.closing.wait(reply.delay)
            with server.lock:  # before the answer leaves, since the next request may come at once
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
                self.wfile.write(reply.body)
            except (BrokenPipeError, ConnectionResetError):  # the judge has stopped waiting
                self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
