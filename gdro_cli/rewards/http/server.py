"""The server of ``gdro rewards serve``: any reward behind the protocol, scored by a pool of processes.

Requests are scored one after the other, each by all processes of the pool. So a reward that crashes or hangs costs its
image and never the server.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import io
import math
import socket
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

from PIL import Image, UnidentifiedImageError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gdro_cli.errors import GdroError, UserError
from gdro_cli.rewards.base import Reward, Score, UnreadableImageError, read_rgb
from gdro_cli.rewards.http.protocol import (
    LARGEST_REQUEST,
    PROTOCOL,
    RemotePrompt,
    answer_content,
    read_request,
)
from gdro_cli.rewards.pool import Pool

LOOPBACK = ("127.0.0.1", "::1", "localhost")
"""Hosts that only this machine reaches."""
_FORMATS = ("PNG", "WEBP", "JPEG")


def make_app(reward: Reward, version: Mapping[str, Any], pool: Pool, *, key: str | None) -> Starlette:
    """The application.

    Args:
        reward: the reward; it is not loaded here.
        version: what its scores depend on.
        pool: open; it scores with the reward.
        key: what a request must have as bearer token; ``None`` for no token.
    """
    turn = asyncio.Lock()
    info: dict[str, Any] = {
        "protocol": PROTOCOL,
        "reward": reward.name,
        "version": dict(version),
        "needs": sorted(reward.needs),
    }
    if all(map(math.isfinite, reward.scale)):
        info["scale"] = list(reward.scale)

    def check(request: Request) -> None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise HTTPException(401, "the key is missing or wrong")

    async def describe(request: Request) -> Response:
        check(request)
        return JSONResponse(info)

    async def score(request: Request) -> Response:
        check(request)
        if request.headers.get("Content-Type", "").split(";")[0].strip() != "application/json":
            raise HTTPException(415, "the body must be application/json")  # which no web page sends unasked
        try:
            images, prompts, sources = read_request(await _body(request))
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        async with turn:
            scores = await asyncio.to_thread(_score, reward, pool, images, prompts, sources)
        return JSONResponse(answer_content(version, scores))

    async def failed(_: Request, error: Exception) -> Response:
        status, text = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, str(error))
        return JSONResponse({"error": text}, status_code=status)

    routes = [Route("/", describe, methods=["GET"]), Route("/", score, methods=["POST"])]
    return Starlette(routes=routes, exception_handlers={HTTPException: failed, GdroError: failed})


def _score(
    reward: Reward,
    pool: Pool,
    texts: Sequence[str],
    prompts: Sequence[RemotePrompt],
    sources: Sequence[str | None],
) -> list[Score]:
    """The scores of a request. Raises what the pool raises, after which the next request opens the pool again."""
    scores: dict[int, Score] = {}
    images: dict[int, Image.Image] = {}
    readable: dict[int, RemotePrompt] = {}
    for index, (text, prompt, given) in enumerate(zip(texts, prompts, sources, strict=True)):
        try:
            target = reward.read_prompt(prompt.prompt, target=prompt.target, metadata=prompt.metadata)
            source = None if given is None else _decode(given)
            images[index] = _decode(text)
        except (UnreadableImageError, ValueError) as error:
            scores[index] = Score(None, str(error))
        else:
            readable[index] = RemotePrompt(prompt.prompt, target, prompt.metadata, source)
    pool.reopen()
    scores |= dict(zip(images, pool.score(list(images.values()), list(readable.values())), strict=True))
    return [scores[index] for index in range(len(texts))]


def _decode(text: str) -> Image.Image:
    """The RGB image of a base64 text. Raises ``UnreadableImageError``."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=_FORMATS)
    except (binascii.Error, UnidentifiedImageError, ValueError, OSError, Image.DecompressionBombError) as error:
        raise UnreadableImageError("the image is not a PNG, WebP or JPEG in base64") from error
    return read_rgb(image)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_REQUEST:
            raise HTTPException(413, f"the body is larger than {LARGEST_REQUEST >> 20} MiB")
    return bytes(body)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises ``UserError``."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}, port {port} ({reason}): choose another --port or --host") from error


def run(app: Starlette, listener: socket.socket) -> None:
    """Answer requests until a signal ends the server, which is its ordinary end. A second signal does not wait."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.should_exit, self.force_exit = True, self.should_exit

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5
    )
    Server(config).run(sockets=[listener])
