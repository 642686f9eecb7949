"""The judge ``unified-reward``: UnifiedReward 2.0 behind an endpoint that speaks OpenAI's chat protocol.

vLLM and SGLang serve it, for example ``vllm serve CodeGoat24/UnifiedReward-2.0-qwen3vl-8b --port 8080``; ``base_url``
is then ``http://localhost:8080/v1``. Images travel as PNG, so what is judged is not compressed. Serve a model that
thinks aloud by default (those on Qwen3.5) with that switched off.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from gdro_cli.rewards.base import ImageSource, UnreadableImageError, read_rgb
from gdro_cli.rewards.judge.base import Judgement
from gdro_cli.rewards.judge.endpoint import Endpoint, NoAnswerError, check_package, check_url, read_key
from gdro_cli.rewards.judge.unified_prompt import (
    MAX_TOKENS,
    TEMPLATE,
    check_template,
    provenance,
    read_answer,
    request_text,
)


class UnifiedRewardJudge:
    """Asks UnifiedReward 2.0 for the axes of each image, greedily (temperature 0).

    ``load`` reads the API key and asks the endpoint once. Details of a judgement: ``answer``, the model's text.

    Provenance holds the model's name at the endpoint but not the address, as equal models at another address judge
    alike; so serve a model under a name that identifies its weights.

    Args:
        base_url: address up to and including the version, such as ``http://localhost:8000/v1``.
        model: name under which the endpoint serves the model.
        api_key_env: environment variable with the API key; ``None`` for an endpoint that wants none. The key is read
            when the judge is loaded and is in no pickle, provenance or message.
        concurrency: requests under way at a time.
        timeout: seconds for connecting, and for each silence of the endpoint.
        retries: further attempts after one without an answer; after the last one the judgement is missing.
        template: the text that goes with an image, with ``{caption}`` where its prompt goes.

    Raises:
        PrerequisiteError: the package ``openai`` is not installed.
        UserError: the address is not one, or holds a password.
        ValueError: a number out of range, or a template without ``{caption}``.
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
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise ValueError("concurrency must be at least 1, timeout above 0 and retries at least 0")
        check_template(template)
        check_package()
        self._url = check_url(base_url)
        self._model = model
        self._key_variable = api_key_env
        self._concurrency = concurrency
        self._timeout = timeout
        self._retries = retries
        self._template = template
        self._checked = False

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance: the model's name, the digest of the prompt, how answers are made and read."""
        return {"judge": "unified-reward", "model": self._model, **provenance(self._template)}

    def load(self) -> None:
        """Read the key and check the endpoint; a second call does nothing.

        Raises:
            PrerequisiteError: the key is missing, or the endpoint cannot be reached, refuses it or lacks the model.
        """
        if not self._checked:
            asyncio.run(self._check())
            self._checked = True

    def judge(self, images: Sequence[ImageSource], prompts: Sequence[str]) -> list[Judgement]:
        """Judge ``images[i]`` for the text ``prompts[i]``, in order. An image that fails is missing with a reason.

        Raises:
            ValueError: not as many prompts as images.
            PrerequisiteError: the endpoint refuses the key or lacks the model.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        self.load()
        return asyncio.run(self._judge_all(images, prompts))

    async def _check(self) -> None:
        endpoint = self._endpoint()
        async with endpoint.client:
            await endpoint.check()

    async def _judge_all(self, images: Sequence[ImageSource], prompts: Sequence[str]) -> list[Judgement]:
        """All judgements. A refusal is raised at once: ``asyncio.run`` cancels the other requests and their pauses."""
        endpoint, gate = self._endpoint(), asyncio.Semaphore(self._concurrency)

        async def judge_one(image: ImageSource, prompt: str) -> Judgement:
            async with gate:
                return await self._judge_one(endpoint, image, prompt)

        async with endpoint.client:
            return await asyncio.gather(*map(judge_one, images, prompts))

    async def _judge_one(self, endpoint: Endpoint, source: ImageSource, prompt: str) -> Judgement:
        try:
            url = await asyncio.to_thread(lambda: data_url(read_rgb(source)))
            content: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": request_text(prompt, template=self._template)},
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
    image.save(buffer, "PNG", compress_level=1)  # the way is short; the time is better spent on judging
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
