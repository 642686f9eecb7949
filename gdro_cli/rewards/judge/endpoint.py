"""Chat requests to an endpoint that speaks OpenAI's protocol, through the ``openai`` client.

The client retries errors that may be temporary after a pause (no connection, no answer in time, 408, 409, 429, 5xx). A
refused key or model (401, 403, 404) and a redirect, which is not followed, end the work with one sentence. Any other
error (another 4xx, such as for an image that is too large, or an unusable answer) concerns only one image.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import httpx2

from gdro_cli.errors import PrerequisiteError
from gdro_cli.rewards.address import QUOTED, check_url, without_key
from gdro_cli.rewards.base import one_line

_REMEDIES = {
    401: "set the environment variable that the judge's api_key_env names to a valid key",
    403: "use a key that may use this model",
    404: "correct the judge's model or base_url",
}
_TEMPORARY = (408, 409, 429)


class NoAnswerError(Exception):
    """A request got no usable answer; the message is the reason."""


class Endpoint:
    """One model of an endpoint; ``async with endpoint.client`` keeps the connections open.

    Args:
        base_url: address up to and including the version, as ``check_url`` takes it.
        model: the endpoint's name for the model.
        key: sent as bearer token; ``None`` for no token.
        timeout: seconds for connecting, and for each silence of the endpoint.
        retries: further attempts after the first.
    """

    def __init__(self, base_url: str, model: str, *, key: str | None, timeout: float, retries: int) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient, Omit

        self._url, self._model, self._key, self._retries = base_url, model, key, retries
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
                f"the judge's endpoint {self._url} cannot be reached ({self._cause(error)}): start the server, or "
                "correct its base_url"
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
                f"the judge's endpoint {self._url} serves {self._hidden(', '.join(names[:5]))[:QUOTED]}, "
                f"not {self._model}: correct the judge's model or base_url"
            )

    async def ask(self, content: list[dict[str, Any]], *, max_tokens: int) -> tuple[str, bool]:
        """The model's greedy answer to one message, and whether the answer is complete.

        Args:
            content: of the message, in the form of OpenAI's protocol.
            max_tokens: tokens after which the answer is cut off.

        Raises:
            NoAnswerError: no attempt got a usable answer.
            PrerequisiteError: the endpoint refuses the key, or does not have the model.
        """
        from openai import APIConnectionError, APIStatusError

        messages: Any = [{"role": "user", "content": content}]
        try:
            answer = await self.client.chat.completions.create(
                model=self._model,
                messages=messages,
                temperature=0,
                max_tokens=max_tokens,
                extra_headers=self._headers,
            )
        except APIConnectionError as error:
            raise self._gave_up(self._cause(error)) from None
        except APIStatusError as error:
            if error.status_code in _TEMPORARY or error.status_code >= 500:
                raise self._gave_up(f"HTTP {error.status_code}") from None
            if error.status_code in _REMEDIES or error.status_code < 400:
                raise self._refusal(error) from None
            raise NoAnswerError(f"the judge's endpoint answers {self._quoted(error)}") from None
        except ValueError:
            raise NoAnswerError("the judge's answer is not JSON") from None
        try:
            text, complete = answer.choices[0].message.content, answer.choices[0].finish_reason != "length"
        except (TypeError, LookupError, AttributeError):
            raise NoAnswerError("the judge's answer is not a chat completion") from None
        if not isinstance(text, str):
            raise NoAnswerError("the judge's answer is not text")
        return self._hidden(text), complete

    def _cause(self, error: Exception) -> str:
        return self._hidden(one_line(error.__cause__ or error))

    def _gave_up(self, reason: str) -> NoAnswerError:
        attempts = self._retries + 1
        return NoAnswerError(f"the judge's endpoint gave no answer in {attempts} attempts, at last {reason}")

    def _refusal(self, error: Any) -> PrerequisiteError:
        remedy = _REMEDIES.get(error.status_code, "correct the judge's base_url")
        return PrerequisiteError(f"the judge's endpoint {self._url} answers {self._quoted(error)}: {remedy}")

    def _quoted(self, error: Any) -> str:
        """The status and the endpoint's own message in one line, without the key."""
        return f"HTTP {error.status_code} ({self._hidden(' '.join(error.message.split()))[:QUOTED]})"

    def _hidden(self, text: str) -> str:
        return without_key(text, self._key)


def check_package() -> None:
    """Raise PrerequisiteError if the client is not installed."""
    if find_spec("openai") is None:
        raise PrerequisiteError(
            "judge.kind unified-reward needs the package openai: run `pip install 'gdro_cli[judge]'`, or choose another"
            " judge.kind"
        )


def check_base_url(base_url: str) -> str:
    """The address without a trailing slash. Raises UserError if it is not like http://localhost:8000/v1."""
    return check_url(base_url, what="the judge's base_url", example="http://localhost:8000/v1", variable="api_key_env")
