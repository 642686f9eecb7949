"""Chat requests to an endpoint that speaks OpenAI's protocol, through the ``openai`` client.

The client retries errors that may be temporary after a pause (no connection, no answer in time, 408, 409, 429, 5xx). A
refused key or model (401, 403, 404) and a redirect, which is not followed, end the work with one sentence. Any other
error (another 4xx, such as for an image that is too large, or an unusable answer) concerns only one image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import httpx2

from gdro_cli.errors import PrerequisiteError
from gdro_cli.network import check_network
from gdro_cli.rewards.address import QUOTED, check_url, without_key
from gdro_cli.rewards.base import one_line

_REMEDIES = {
    401: "set the environment variable that {owner} api_key_env names to a valid key",
    403: "use a key that may use this model",
    404: "correct {owner} model or base_url",
}
_TEMPORARY = (408, 409, 429)
_TOP = 20
"""Alternatives of a token that are asked for; the most that OpenAI's protocol allows."""


class NoAnswerError(Exception):
    """A request got no usable answer; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered."""

    text: str
    complete: bool
    """Whether the model ended it."""
    first: Mapping[str, float] = field(default_factory=dict)
    """Probabilities of the likeliest first tokens, where they were asked for and the server gives them."""


class Endpoint:
    """One model of an endpoint; ``async with endpoint.client`` keeps the connections open.

    Args:
        base_url: address up to and including the version, as ``check_url`` takes it.
        model: the endpoint's name for the model.
        key: sent as bearer token; ``None`` for no token.
        timeout: seconds for connecting, and for each silence of the endpoint.
        retries: further attempts after the first.
        owner: whose endpoint it is, for messages.

    Raises:
        PrerequisiteError: a setting of the environment forbids every request.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key: str | None,
        timeout: float,
        retries: int,
        owner: str = "the judge's",
    ) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Omit

        check_network()
        self._url, self._model, self._key, self._retries = base_url, model, key, retries
        self._owner = owner
        # The client takes missing values from OPENAI_* variables, which are meant for another service.
        omitted = ("OpenAI-Organization", "OpenAI-Project", *(("Authorization",) if key is None else ()))
        self._headers: dict[str, Any] = dict.fromkeys(omitted, Omit())
        self.client = AsyncOpenAI(
            base_url=base_url,
            api_key=key or "none",
            admin_api_key="",
            max_retries=retries,
            timeout=timeout,
            http_client=DefaultAsyncHttpxClient(follow_redirects=False),
        )

    async def check(self) -> None:
        """Request the list of models once.

        An endpoint that has no such list passes: only a request for a judgement shows whether it works.

        Raises:
            PrerequisiteError: the endpoint cannot be reached, refuses the key, or does not have the model.
        """
        from openai import APIConnectionError, APIStatusError

        try:
            answer = await self.client.with_options(max_retries=0).get(
                "/models", cast_to=httpx2.Response, options={"headers": self._headers}
            )
        except APIConnectionError as error:
            raise PrerequisiteError(
                f"{self._owner} endpoint {self._url} cannot be reached ({self._cause(error)}): start the server, or "
                "correct its base_url (docs/rewards.md#a-vision-language-model)"
            ) from None
        except APIStatusError as error:
            if error.status_code in (401, 403):
                raise self._refusal(error) from None
            return
        try:
            names = [str(model["id"]) for model in answer.json()["data"]]
        except (ValueError, TypeError, LookupError):
            return
        if names and self._model not in names:
            raise PrerequisiteError(
                f"{self._owner} endpoint {self._url} serves {self._hidden(', '.join(names[:5]))[:QUOTED]}, "
                f"not {self._model}: correct {self._owner} model or base_url"
            )

    async def ask(self, content: list[dict[str, Any]], *, max_tokens: int, probabilities: bool = False) -> Answer:
        """The model's greedy answer to one message.

        Args:
            content: of the message, in the form of OpenAI's protocol.
            max_tokens: tokens after which the answer is cut off.
            probabilities: ask for those of the first token.

        Raises:
            NoAnswerError: no attempt got a usable answer.
            PrerequisiteError: the endpoint refuses the key, or does not have the model.
        """
        from openai import APIConnectionError, APIStatusError

        messages: Any = [{"role": "user", "content": content}]
        more: Any = {"logprobs": True, "top_logprobs": _TOP} if probabilities else {}
        try:
            answer = await self.client.chat.completions.create(
                model=self._model,
                messages=messages,
                temperature=0,
                max_tokens=max_tokens,
                extra_headers=self._headers,
                **more,
            )
        except APIConnectionError as error:
            raise self._gave_up(self._cause(error)) from None
        except APIStatusError as error:
            if error.status_code in _TEMPORARY or error.status_code >= 500:
                raise self._gave_up(f"HTTP {error.status_code}") from None
            if error.status_code in _REMEDIES or error.status_code < 400:
                raise self._refusal(error) from None
            raise NoAnswerError(f"{self._owner} endpoint answers {self._quoted(error)}") from None
        except ValueError:
            raise NoAnswerError(f"{self._owner} answer is not JSON") from None
        try:
            text, complete = answer.choices[0].message.content, answer.choices[0].finish_reason != "length"
        except (TypeError, LookupError, AttributeError):
            raise NoAnswerError(f"{self._owner} answer is not a chat completion") from None
        if not isinstance(text, str):
            raise NoAnswerError(f"{self._owner} answer is not text")
        return Answer(self._hidden(text), complete, _first(answer) if probabilities else {})

    def _cause(self, error: Exception) -> str:
        return self._hidden(one_line(error.__cause__ or error))

    def _gave_up(self, reason: str) -> NoAnswerError:
        attempts = self._retries + 1
        return NoAnswerError(f"{self._owner} endpoint gave no answer in {attempts} attempts, at last {reason}")

    def _refusal(self, error: Any) -> PrerequisiteError:
        remedy = _REMEDIES.get(error.status_code, "correct {owner} base_url").format(owner=self._owner)
        return PrerequisiteError(f"{self._owner} endpoint {self._url} answers {self._quoted(error)}: {remedy}")

    def _quoted(self, error: Any) -> str:
        """The status and the endpoint's own message in one line, without the key."""
        return f"HTTP {error.status_code} ({self._hidden(' '.join(error.message.split()))[:QUOTED]})"

    def _hidden(self, text: str) -> str:
        return without_key(text, self._key)


def _first(answer: Any) -> dict[str, float]:
    """The probabilities of the first token's alternatives; empty if the server gives none."""
    try:
        alternatives = answer.choices[0].logprobs.content[0].top_logprobs
        return {str(each.token): math.exp(min(float(each.logprob), 0.0)) for each in alternatives}
    except (TypeError, LookupError, AttributeError, ValueError):
        return {}


def check_package(who: str = "judge.kind unified-reward") -> None:
    """Raise PrerequisiteError if the client is not installed, which ``who`` needs."""
    if find_spec("openai") is None:
        key = who.split()[0]
        raise PrerequisiteError(
            f"{who} needs the package openai: run `pip install 'gdro_cli[judge]'`, or choose another {key}"
            " (docs/rewards.md#a-vision-language-model)"
        )


def check_base_url(base_url: str, *, owner: str = "the judge's") -> str:
    """The address without a trailing slash. Raises UserError if it is not like http://localhost:8000/v1."""
    return check_url(base_url, what=f"{owner} base_url", example="http://localhost:8000/v1", variable="api_key_env")
