"""Requests to a reward server.

Errors that may be temporary (no connection, no answer in time, 408, 429, 5xx) are repeated after a pause. A refused key
or address (401, 403, 404) and a redirect, which is not followed, end the work with one sentence. Any other error
concerns the images of one request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import httpx2

from gdro_cli.errors import PrerequisiteError
from gdro_cli.network import check_network
from gdro_cli.rewards.address import QUOTED, without_key
from gdro_cli.rewards.base import one_line
from gdro_cli.rewards.http.protocol import LARGEST_ANSWER, BadAnswerError, Info, read_info

_REMEDIES = {
    401: "set the environment variable that reward.http.api_key_env names to the server's key",
    403: "use a key that this server accepts",
    404: "correct reward.http.url",
}
_TEMPORARY = (408, 429)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
"""Seconds between two attempts; each pause is twice the last."""


class NoAnswerError(Exception):
    """A request got no usable answer; the message is the reason."""

    def __init__(self, reason: str, *, down: bool = False) -> None:
        super().__init__(reason)
        self.down = down
        """Whether the server gave no answer at all in any attempt."""


class _NoContactError(Exception):
    """One attempt failed in a way that may pass."""


class RewardClient:
    """Connections to one server; ``async with client.connections`` keeps them open.

    Args:
        url: the server's address.
        key: sent as bearer token; ``None`` for no token.
        timeout: seconds for a whole request, its answer included.

    Raises:
        PrerequisiteError: a setting of the environment forbids every request.
    """

    def __init__(self, url: str, *, key: str | None, timeout: float) -> None:
        self._url, self.key, self._timeout = url, key, timeout
        check_network()
        headers = {"Accept-Encoding": "identity"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        self.connections = httpx2.AsyncClient(headers=headers, follow_redirects=False, timeout=timeout)

    async def info(self) -> Info:
        """Ask the server about its reward, once.

        Raises:
            PrerequisiteError: it cannot be reached, refuses, or does not follow the protocol.
        """
        try:
            status, body = await self._send("GET", None)
            self._refuse(status, body)
            if status != 200:
                raise PrerequisiteError(f"the reward server {self._url} answers HTTP {status}: look at its messages")
            return read_info(body, key=self.key)
        except _NoContactError as error:
            raise PrerequisiteError(
                f"the reward server {self._url} cannot be reached ({error}): start it, or correct reward.http.url"
                " (docs/reward-servers.md)"
            ) from None
        except BadAnswerError as error:
            raise PrerequisiteError(
                f"the answer of {self._url} {error}: correct reward.http.url, or the server (docs/reward-servers.md)"
            ) from None

    async def ask(self, body: bytes, *, attempts: int) -> bytes:
        """The server's answer to a request for scores.

        Raises:
            NoAnswerError: no attempt got a usable answer.
            PrerequisiteError: the server refuses the key or the address.
        """
        pause, reason, down = _FIRST_PAUSE, "", True
        for attempt in range(attempts):
            if attempt:
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            try:
                status, answer = await self._send("POST", body)
            except _NoContactError as error:
                reason = str(error)
                continue
            except BadAnswerError as error:
                raise NoAnswerError(f"the reward server's answer {error}") from None
            self._refuse(status, answer)
            if status == 200:
                return answer
            if status not in _TEMPORARY and status < 500:
                raise NoAnswerError(f"the reward server answers HTTP {status}{self._quoted(answer)}")
            reason, down = f"HTTP {status}{self._quoted(answer)}", False
        tries = "attempt" if attempts == 1 else "attempts"
        raise NoAnswerError(f"the reward server gave no scores in {attempts} {tries}, at last {reason}", down=down)

    async def _send(self, method: str, body: bytes | None) -> tuple[int, bytes]:
        headers: Mapping[str, str] = {} if body is None else {"Content-Type": "application/json"}
        answer = bytearray()
        try:
            async with (
                asyncio.timeout(self._timeout),
                self.connections.stream(method, self._url, content=body, headers=headers) as response,
            ):
                async for part in response.aiter_bytes():
                    answer += part
                    if len(answer) > LARGEST_ANSWER:
                        raise BadAnswerError(f"is larger than {LARGEST_ANSWER >> 20} MiB")
            return response.status_code, bytes(answer)
        except TimeoutError:
            raise _NoContactError(f"no answer within {self._timeout:g} s") from None
        except httpx2.HTTPError as error:
            raise _NoContactError(without_key(one_line(error), self.key)) from None

    def _refuse(self, status: int, answer: bytes) -> None:
        if status in _REMEDIES or 300 <= status < 400:
            remedy = _REMEDIES.get(status, "correct reward.http.url, since redirects are not followed")
            raise PrerequisiteError(
                f"the reward server {self._url} answers HTTP {status}{self._quoted(answer)}: {remedy}"
            )

    def _quoted(self, answer: bytes) -> str:
        """The server's own message in one line, without the key."""
        text = without_key(" ".join(answer.decode("utf-8", "replace").split()), self.key)[:QUOTED]
        return f" ({text})" if text else ""
