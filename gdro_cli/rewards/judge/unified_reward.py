"""The judge ``unified-reward``: UnifiedReward 2.0 behind an endpoint that speaks OpenAI's chat protocol.

vLLM and SGLang serve it, for example ``vllm serve CodeGoat24/UnifiedReward-2.0-qwen3vl-8b --port 8080``; ``base_url``
is then ``http://localhost:8080/v1``. Images are sent as PNG, which loses nothing. Switch off the thinking mode of a
model that has it on by default (those based on Qwen3.5).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from gdro_cli.rewards.address import read_key
from gdro_cli.rewards.base import ImageSource, Resources, UnreadableImageError, read_rgb
from gdro_cli.rewards.endpoint import Endpoint, NoAnswerError, check_base_url, check_package
from gdro_cli.rewards.judge.base import Judgement
from gdro_cli.rewards.judge.unified_prompt import MAX_TOKENS, TEMPLATE, provenance, read_answer, request_text
from gdro_cli.rewards.png import png_base64


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
        template: the words of a request, with a place for the prompt.

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
        template: str = TEMPLATE,
    ) -> None:
        check_package()
        self._url = check_base_url(base_url)
        self._model = model
        self._key_variable = api_key_env
        self._concurrency = concurrency
        self._timeout = timeout
        self._retries = retries
        self._template = template
        self._checked = False

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance: the model's name, the digest of the prompt, how answers are generated and read."""
        return {"judge": "unified-reward", "model": self._model, **provenance(self._template)}

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
            image = await asyncio.to_thread(lambda: png_base64(read_rgb(source)))
            content: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
                {"type": "text", "text": request_text(prompt, template=self._template)},
            ]
            answer = await endpoint.ask(content, max_tokens=MAX_TOKENS)
        except (UnreadableImageError, NoAnswerError) as error:
            return Judgement.missing(str(error))
        return read_answer(answer.text, complete=answer.complete)

    def _endpoint(self) -> Endpoint:
        key = read_key(self._key_variable, owner="the judge's")
        return Endpoint(self._url, self._model, key=key, timeout=self._timeout, retries=self._retries)
