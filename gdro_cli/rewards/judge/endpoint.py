"""Requests to an endpoint that speaks OpenAI's chat protocol: who may ask, how often, and what an answer is.

What passes by itself (no connection, no answer in time, 408, 429, 5xx) is tried again after a pause; what does not
(a key or a model that is refused: 401, 403, 404) ends the work with one sentence; what is wrong with one request or one
answer (other 4xx, such as a picture that is too large) concerns one image. Redirects are not followed.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.rewards.base import one_line

FIRST_PAUSE = 0.5
"""Seconds before the second attempt; every further pause is twice as long."""
LONGEST_PAUSE = 60.0
"""Seconds; no pause is longer, not even one that the endpoint asks for."""
_LARGEST_PORT = 65_535
_PASSING = frozenset({408, 429})
_REFUSED = frozenset({401, 403, 404})
_QUOTED = 200
"""Characters of the endpoint's own message that an error shows."""
LARGEST_ANSWER = 4 * 2**20
"""Bytes; no more of an answer is read. One of three lines has a thousandth of that."""
_SHORTEST_SECRET = 8
"""Characters; an answer holds a shorter key, such as the ``EMPTY`` of a server without keys, by chance."""


class NoAnswerError(Exception):
    """One request that got no usable answer; the message is the reason."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came back."""

    status: int
    phrase: str
    retry_after: str | None
    body: bytes
    whole: bool
    """Whether there was no more than ``LARGEST_ANSWER`` of it."""

    @property
    def good(self) -> bool:
        """Whether the endpoint did what it was asked for."""
        return 200 <= self.status < 300

    def json(self) -> Any:
        """The body. Raises ValueError when it is not JSON."""
        try:
            value = json.loads(self.body)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        return value


class Endpoint:
    """An open connection to one model of an endpoint. It may be used by several threads.

    Args:
        base_url: address up to and including the version, as ``check_url`` takes it.
        model: name of the model there.
        key: sent as bearer token; ``None`` for none.
        connections: requests that may be under way at a time.
        timeout: seconds for connecting, for the first silence, and for the whole of a request once it is answered.
        retries: further attempts after the first.
    """

    def __init__(
        self, base_url: str, model: str, *, key: str | None, connections: int, timeout: float, retries: int
    ) -> None:
        self._url = base_url
        self._model = model
        self._key = key
        self._retries = retries
        self._timeout = timeout
        # compressed, a small answer could be a large one
        headers = {"Accept-Encoding": "identity"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        self._client = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(timeout, pool=None),
            limits=httpx2.Limits(max_connections=connections),
        )

    def check(self) -> None:
        """Ask once which models there are.

        An endpoint that answers but does not tell passes: only a request for a judgement shows whether it works.

        Raises:
            PrerequisiteError: it cannot be reached, refuses the key, or has other models only.
        """
        try:
            answer = self._send("GET", "models")
        except httpx2.RequestError as error:
            raise PrerequisiteError(
                f"the judge's endpoint {self._url} cannot be reached ({self._hidden(one_line(error))}): start the "
                "server, or correct its base_url"
            ) from None
        if answer.status in (401, 403):
            raise self._refusal(answer)
        names = [self._hidden(name)[:_QUOTED] for name in _model_names(answer)] if answer.good else []
        if names and self._hidden(self._model)[:_QUOTED] not in names:
            raise PrerequisiteError(
                f"the judge's endpoint {self._url} serves {', '.join(names[:5])}, not {self._model}: correct the "
                f"judge's model or base_url"
            )

    def ask(self, request: Mapping[str, Any], *, stop: threading.Event) -> tuple[str, bool]:
        """The text that the model answers to a chat request, and whether the model ended it (else it was cut off).

        Args:
            request: JSON of the request, without the model.
            stop: when set, no further attempt is made.

        Raises:
            NoAnswerError: no attempt brought a usable answer.
            PrerequisiteError: the endpoint refuses the key, or has no such model.
        """
        body = json.dumps({"model": self._model, **request}).encode()
        reason = ""
        for attempt in range(self._retries + 1):
            wanted_pause = None
            try:
                answer = self._send("POST", "chat/completions", body)
            except httpx2.TransportError as error:
                reason = self._hidden(one_line(error))
            except httpx2.RequestError as error:
                raise NoAnswerError(f"the judge's answer cannot be decoded: {self._hidden(one_line(error))}") from None
            else:
                if answer.good:
                    text, complete = _text(answer)
                    secret = self._key is not None and len(self._key) >= _SHORTEST_SECRET
                    return (self._hidden(text) if secret else text), complete
                if answer.status in _REFUSED or answer.status < 400:
                    raise self._refusal(answer)
                if answer.status not in _PASSING and answer.status < 500:
                    raise NoAnswerError(f"the judge's endpoint answers {self._told(answer)}")
                reason = f"HTTP {answer.status}"
                wanted_pause = retry_after(answer.retry_after)
            if attempt < self._retries and stop.wait(pause(attempt, wanted=wanted_pause)):
                break
        raise NoAnswerError(f"the judge's endpoint gave no answer in {self._retries + 1} attempts, at last {reason}")

    def close(self) -> None:
        """End the connections."""
        self._client.close()

    def _send(self, method: str, place: str, body: bytes | None = None) -> _Answer:
        """One request; an answer without end, in size or in time, is not read to its end."""
        headers = {} if body is None else {"Content-Type": "application/json"}
        deadline = time.monotonic() + self._timeout
        with self._client.stream(method, f"{self._url}/{place}", content=body, headers=headers) as response:
            encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
            if encoding not in ("", "identity"):
                raise httpx2.DecodingError("it is compressed, which was not asked for", request=response.request)
            data = bytearray()
            for part in response.iter_raw():
                data += part
                if len(data) > LARGEST_ANSWER:
                    break
                if time.monotonic() > deadline:
                    raise httpx2.ReadTimeout(
                        f"the answer is not complete after {self._timeout:g} seconds", request=response.request
                    )
            whole = len(data) <= LARGEST_ANSWER
            after = response.headers.get("Retry-After")
            return _Answer(response.status_code, response.reason_phrase, after, bytes(data), whole)

    def _refusal(self, response: _Answer) -> PrerequisiteError:
        remedy = {
            401: "set the environment variable that the judge's api_key_env names to a valid key",
            403: "use a key that may use this model",
            404: "correct the judge's model or base_url",
        }.get(response.status, "correct the judge's base_url")
        return PrerequisiteError(f"the judge's endpoint {self._url} answers {self._told(response)}: {remedy}")

    def _told(self, response: _Answer) -> str:
        """Status and the endpoint's own message, without the key."""
        status = self._hidden(f"{response.status} {response.phrase}".strip())[:_QUOTED]
        said = self._hidden(_message(response))[:_QUOTED]
        return f"{status} ({said})" if said else status

    def _hidden(self, text: str) -> str:
        """A text of the endpoint's without the key, which it may say back; to be used before the text is cut."""
        return text if self._key is None else text.replace(self._key, "***")


def check_url(base_url: str) -> str:
    """The address without a slash at its end. Raises UserError for one that is not like http://localhost:8000/v1."""
    if any(mark in base_url for mark in "@?#;"):
        # it may hold a secret, so it is not shown
        raise UserError(
            "the judge's base_url holds a user name, a password, a query or a fragment: it must be an address like "
            "http://localhost:8000/v1, and api_key_env the name of the environment variable with the API key"
        )
    try:
        parts = httpx2.URL(base_url)
    except httpx2.InvalidURL:
        parts = httpx2.URL()
    port = parts.port or 0
    if parts.scheme not in ("http", "https") or not parts.host or port > _LARGEST_PORT:
        raise UserError(
            f"the judge's base_url is {base_url[:_QUOTED]!r}: it must be an address like http://localhost:8000/v1"
        )
    return base_url.rstrip("/")


def read_key(variable: str | None) -> str | None:
    """The API key in an environment variable; ``None`` when no variable is named.

    Raises:
        PrerequisiteError: the variable is empty, or holds what cannot be a key. The message does not show it.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise PrerequisiteError(f"the environment variable {variable} is empty: put the judge's API key into it")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise PrerequisiteError(f"the environment variable {variable} holds no API key: it must be one printable word")
    return key


def pause(attempt: int, *, wanted: float | None = None) -> float:
    """Seconds to wait after a failed attempt (the first is 0): what the endpoint wants, or twice as long every time.

    The latter is shortened at random by up to half, so that requests that failed together do not come back together.
    """
    if wanted is not None:
        return min(wanted, LONGEST_PAUSE)
    return float(min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1.0))


def retry_after(value: str | None) -> float | None:
    """Seconds that a ``Retry-After`` header asks for, as a number or a date; ``None`` for neither."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        return max(0.0, (when - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return None


def _text(response: _Answer) -> tuple[str, bool]:
    """Text of the first choice, and whether it is complete."""
    if not response.whole:
        raise NoAnswerError(f"the judge's answer has more than {LARGEST_ANSWER // 2**20} MiB")
    try:
        choices = response.json()["choices"]
        choice = choices[0]
        text = choice["message"]["content"]
        complete = choice.get("finish_reason") != "length"
    except ValueError:
        raise NoAnswerError("the judge's answer is not JSON") from None
    except IndexError:
        raise NoAnswerError("the judge's answer holds no choices") from None
    except (KeyError, TypeError, AttributeError):
        raise NoAnswerError("the judge's answer is not that of a chat") from None
    if not isinstance(text, str):
        raise NoAnswerError("the judge's answer is not text")
    return text, complete


def _model_names(response: _Answer) -> list[str]:
    try:
        return [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return []


def _message(response: _Answer) -> str:
    """What an error's body says, in one line; empty when it says nothing in the known forms."""
    try:
        body = response.json()
    except ValueError:
        return ""
    error = body.get("error", body) if isinstance(body, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    return " ".join(said.split()) if isinstance(said, str) else ""
