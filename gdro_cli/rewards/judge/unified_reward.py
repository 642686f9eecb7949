"""The judge ``unified-reward``: UnifiedReward 2.0 behind an endpoint that speaks OpenAI's chat protocol.

vLLM and SGLang serve it, for example ``vllm serve CodeGoat24/UnifiedReward-2.0-qwen3vl-8b --port 8080``; ``base_url``
is then ``http://localhost:8080/v1``. Images travel as PNG, so what is judged is not compressed. Serve a model that
thinks aloud by default (those on Qwen3.5) with that switched off.
"""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

from PIL import Image

from gdro_cli.errors import PrerequisiteError
from gdro_cli.rewards.base import ImageSource, UnreadableImageError, read_rgb
from gdro_cli.rewards.judge.base import Judgement
from gdro_cli.rewards.judge.endpoint import Endpoint, NoAnswerError, check_url, read_key
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
    alike; so serve a model under a name that tells its weights.

    Args:
        base_url: address up to and including the version, such as ``http://localhost:8000/v1``.
        model: name under which the endpoint serves the model.
        api_key_env: environment variable with the API key; ``None`` for an endpoint that wants none. The key is read
            when the judge is loaded and is in no pickle, provenance or message.
        concurrency: requests under way at a time.
        timeout: seconds for connecting, for the first silence, and for the whole of a request once it is answered.
        retries: further attempts after one without an answer; after the last one the judgement is missing.
        template: the text that goes with an image, with ``{caption}`` where its prompt goes.

    Raises:
        UserError: the address is none, or holds a password.
        ValueError: a number out of range, or a template without a place for the caption.
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
        self._url = check_url(base_url)
        self._model = model
        self._key_variable = api_key_env
        self._concurrency = concurrency
        self._timeout = timeout
        self._retries = retries
        self._template = template
        self._endpoint: Endpoint | None = None

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance: the model's name, the digest of the prompt, how answers are made and read."""
        return {"judge": "unified-reward", "model": self._model, **provenance(self._template)}

    def load(self) -> None:
        """Read the key and check the endpoint; a second call does nothing.

        Raises:
            PrerequisiteError: there is no key, or the endpoint cannot be reached, refuses it or lacks the model.
        """
        self._loaded()

    def judge(self, images: Sequence[ImageSource], prompts: Sequence[str]) -> list[Judgement]:
        """Judge ``images[i]`` for the text ``prompts[i]``, in order. An image that fails is missing with a reason.

        Raises:
            ValueError: not as many prompts as images.
            PrerequisiteError: the endpoint refuses what is asked (key, model).
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        endpoint, stop = self._loaded(), threading.Event()
        with ThreadPoolExecutor(self._concurrency, thread_name_prefix="gdro-judge") as threads:
            answers = [
                threads.submit(self._judge_one, endpoint, image, prompt, stop)
                for image, prompt in zip(images, prompts, strict=True)
            ]
            try:
                done, _ = wait(answers, return_when=FIRST_EXCEPTION)
                for answer in done:
                    answer.result()
            finally:  # after an error nobody waits for the others' pauses
                stop.set()
                threads.shutdown(wait=False, cancel_futures=True)
            return [answer.result() for answer in answers]

    def _judge_one(self, endpoint: Endpoint, source: ImageSource, prompt: str, stop: threading.Event) -> Judgement:
        if stop.is_set():
            return Judgement.missing("the judging was stopped")
        try:
            picture = data_url(read_rgb(source))
            answer, complete = endpoint.ask(self._request(picture, prompt), stop=stop)
        except (UnreadableImageError, NoAnswerError) as error:
            return Judgement.missing(str(error))
        except PrerequisiteError:  # it would meet all the others, too
            stop.set()
            raise
        return read_answer(answer, complete=complete)

    def _request(self, picture: str, prompt: str) -> dict[str, Any]:
        content = [
            {"type": "image_url", "image_url": {"url": picture}},
            {"type": "text", "text": request_text(prompt, template=self._template)},
        ]
        return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": MAX_TOKENS}

    def _loaded(self) -> Endpoint:
        if self._endpoint is None:
            endpoint = Endpoint(
                self._url,
                self._model,
                key=read_key(self._key_variable),
                connections=self._concurrency,
                timeout=self._timeout,
                retries=self._retries,
            )
            try:
                endpoint.check()
            except BaseException:
                endpoint.close()
                raise
            self._endpoint = endpoint
        return self._endpoint

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the connection, which holds the key."""
        return {**self.__dict__, "_endpoint": None}


def data_url(image: Image.Image) -> str:
    """An image as PNG in a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # the way is short; the time is better spent on judging
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
