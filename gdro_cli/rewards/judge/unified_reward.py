"""The judge ``unified-reward``: UnifiedReward 2.0 behind an endpoint that speaks OpenAI's chat protocol.

vLLM and SGLang serve it, for example ``vllm serve CodeGoat24/UnifiedReward-2.0-qwen3vl-8b --port 8080``; ``base_url``
is then ``http://localhost:8080/v1``. Images are sent as PNG, which loses nothing. Switch off the thinking mode of a
model that has it on by default (those based on Qwen3.5).
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from gdro_cli.rewards.base import ImageSource, Resources, UnreadableImageError, read_rgb
from gdro_cli.rewards.judge.base import Judgement
from gdro_cli.rewards.judge.endpoint import Endpoint, NoAnswerError, check_package, check_url, read_key
from gdro_cli.rewards.judge.unified_prompt import MAX_TOKENS, provenance, read_answer, request_text


class UnifiedRewardJudge:
    """Asks UnifiedReward 2.0 for the axes of each image, greedily (temperature 0).

    ``load`` reads the API key and checks the endpoint. Details of a judgement: ``answer``, the model's text.

    The provenance has the model's name at the endpoint but not the address, because the same model at another address
    gives the same judgements. So serve a model under a name that identifies its weights.

    Args:
        base_url: address up to and including the version, such as ``http://localhost:8000/v1``.
        model: name under which the endpoint serves the model.
        api_key_env: environment variable with the API key; ``None`` for an endpoint that needs no key. The key is read
            for each call of ``load`` and ``judge``; it is never part of a pickle, a provenance or a message.
        concurrency: simultaneous requests, 1 or more.
        timeout: seconds for connecting, and for each silence of the endpoint; above 0.
        retries: further attempts after one without an answer, 0 or more. After the last one the judgement is missing.

    Raises:
        PrerequisiteError: the package ``openai`` is not installed.
        UserError: the address is invalid, or contains a password.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key_env: str | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 4,
    ) -> None:
        check_package()
        self._url = check_url(base_url)
        self._model = model
        self._key_variable = api_key_env
        self._concurrency = concurrency
        self._timeout = timeout
        self._retries = retries
        self._checked = False

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance: the model's name, the digest of the prompt, how answers are generated and read."""
        return {"judge": "unified-reward", "model": self._model, **provenance()}

    @property
    def resources(self) -> Resources:
        """An endpoint, which gets several requests at a time."""
        return "server"

    def load(self) -> None:
        """Read the key and check the endpoint; a second call does nothing.

        Raises:
            PrerequisiteError: the key is missing, or the endpoint cannot be reached, refuses the key or lacks the
                model.
        """
        if not self._checked:
            asyncio.run(self._check())
            self._checked = True

    def judge(self, images: Sequence[ImageSource], prompts: Sequence[str]) -> list[Judgement]:
        """Judge ``images[i]`` for the text ``prompts[i]``, in order. An image that fails is missing with a reason.

        Raises:
            ValueError: the numbers of images and prompts differ.
            PrerequisiteError: the endpoint refuses the key or lacks the model.
        """
        self.load()
        return asyncio.run(self._judge_all(images, prompts))

    async def _check(self) -> None:
        endpoint = self._endpoint()
        async with endpoint.client:
            await endpoint.check()

    async def _judge_all(self, images: Sequence[ImageSource], prompts: Sequence[str]) -> list[Judgement]:
        """All judgements. A refusal is raised at once: ``asyncio.run`` cancels the other requests and retries."""
        endpoint, gate = self._endpoint(), asyncio.Semaphore(self._concurrency)

        async def judge_one(image: ImageSource, prompt: str) -> Judgement:
            async with gate:
                return await self._judge_one(endpoint, image, prompt)

        pairs = list(zip(images, prompts, strict=True))
        async with endpoint.client:
            return await asyncio.gather(*(judge_one(*pair) for pair in pairs))

    async def _judge_one(self, endpoint: Endpoint, source: ImageSource, prompt: str) -> Judgement:
        try:
            url = await asyncio.to_thread(lambda: data_url(read_rgb(source)))
            content: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": request_text(prompt)},
            ]
            answer, complete = await endpoint.ask(content, max_tokens=MAX_TOKENS)
        except (UnreadableImageError, NoAnswerError) as error:
            return Judgement.missing(str(error))
        return read_answer(answer, complete=complete)

    def _endpoint(self) -> Endpoint:
        key = read_key(self._key_variable)
        return Endpoint(self._url, self._model, key=key, timeout=self._timeout, retries=self._retries)


def data_url(image: Image.Image) -> str:
    """An image as PNG in a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # fast: the endpoint is usually near
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
