"""A server for one page, on this machine only: the page, its script and the run's image sheets, and nothing else."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from gdro_cli.errors import UserError
from gdro_cli.stages.reporting.html import TEMPLATES
from gdro_cli.stages.reporting.image_sheet import point_sheet
from gdro_cli.stages.watching.page import draw_page, fingerprint

HOST = "127.0.0.1"
_OWN_NAMES = (HOST, "localhost")
"""Hosts by which a browser may ask: a page of another site that has pointed its own name here gets nothing."""
_SHEET = re.compile(r"/validation/step-(\d{6,9})\.png")
_SHARE = 0.05
"""Drawing may take this share of the time at most, however many browsers ask: it takes it from the training."""

Answer = tuple[HTTPStatus, str, bytes]
"""Status, content type and content."""


class RunServer(ThreadingHTTPServer):
    """Answers requests for the page of one run.

    Args:
        run: the run's folder, which need not exist yet.
        port: 0 for any free one.
        say: gets one sentence, the first time that the page cannot be drawn.

    Raises:
        OSError, OverflowError: the port cannot be used.
    """

    daemon_threads = True

    def __init__(self, run: Path, port: int, say: Callable[[str], object]) -> None:
        self._run, self._say = run, say
        self._drawing = threading.Lock()
        self._page, self._next = b"", 0.0
        self._drawn_from: Any = None
        self._warned = False
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        """Where a browser finds the page."""
        return f"http://{HOST}:{self.server_address[1]}"

    def answer(self, path: str, host: str) -> Answer:
        """The answer to a request for a path under a host's name."""
        if re.sub(r":\d+$", "", host) not in _OWN_NAMES:
            return _text(HTTPStatus.FORBIDDEN, "Open this page as 127.0.0.1 or localhost.")
        try:
            return self._file(path)
        except Exception as error:  # noqa: BLE001 (whatever fails here must not disturb a training)
            if not self._warned:
                self._warned = True
                self._say(
                    f"the page of the run cannot be drawn ({type(error).__name__}: {error}); the run is not affected"
                )
            return _text(HTTPStatus.INTERNAL_SERVER_ERROR, "The page cannot be drawn.")

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that leaves early is not an error."""

    def _file(self, path: str) -> Answer:
        if path == "/":
            return HTTPStatus.OK, "text/html; charset=utf-8", self._current()
        if path == "/watch.js":
            return HTTPStatus.OK, "text/javascript; charset=utf-8", (TEMPLATES / "watch.js").read_bytes()
        match = _SHEET.fullmatch(path)
        sheet = None if match is None else point_sheet(self._run, int(match[1]))
        if sheet is None:
            return _text(HTTPStatus.NOT_FOUND, "There is only the page of a run here.")
        return HTTPStatus.OK, "image/png", (self._run / sheet).read_bytes()

    def _current(self) -> bytes:
        """The page, drawn again if the run has changed."""
        with self._drawing:
            began, state = time.monotonic(), fingerprint(self._run)
            if state != self._drawn_from and began >= self._next:
                self._page, self._drawn_from = draw_page(self._run), state
                ended = time.monotonic()
                self._next = ended + (ended - began) / _SHARE
            return self._page


class _Handler(BaseHTTPRequestHandler):
    server: RunServer
    timeout = 10.0

    def do_GET(self) -> None:
        """Answer."""
        status, kind, content = self.server.answer(self.path, self.headers.get("Host", ""))
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(content))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """The terminal belongs to the training."""


@contextmanager
def serving(run: Path, *, port: int, say: Callable[[str], object]) -> Iterator[str]:
    """Serve the page of a run in a thread while the block runs, which gets its address.

    Args:
        run: the run's folder, which need not exist yet.
        port: 0 for any free one.
        say: gets one sentence, the first time that the page cannot be drawn.

    Raises:
        UserError: the port cannot be used.
    """
    try:
        server = RunServer(run, port, say)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on port {port} of this machine ({reason}): choose another --port") from error
    with server:
        threading.Thread(target=server.serve_forever, name="watch", daemon=True).start()
        try:
            yield server.address
        finally:
            server.shutdown()


def _text(status: HTTPStatus, text: str) -> Answer:
    return status, "text/plain; charset=utf-8", f"{text}\n".encode()
