"""The reward ``vlm``: a vision-language model rates the images, behind an endpoint of OpenAI's chat protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gdro_cli.config.base import Affects, StrictModel
from gdro_cli.files import sha256
from gdro_cli.rewards.base import ImageSource, PromptLike, Resources, Reward, Score
from gdro_cli.rewards.vlm.answers import (
    EDIT_RATING,
    EDIT_YES_NO,
    QUESTION,
    RATING,
    RULE,
    YES_NO,
    UnusableAnswerError,
    mean_of,
    read_rating,
    read_yes,
)

if TYPE_CHECKING:
    from gdro_cli.rewards.endpoint import Answer, Endpoint

_OWNER = "reward.vlm's"
_QUOTED = 300
"""Characters of an answer that the details keep."""


class VlmSettings(StrictModel):
    """Settings of the reward by a vision-language model behind an endpoint."""

    base_url: Annotated[str, Affects("speed")] = Field(min_length=1)
    """Address of the endpoint (vLLM, SGLang, or any other of OpenAI's chat protocol), up to `/v1`, without a user name,
    key or query."""
    model: str = Field(min_length=1)
    """The name by which the endpoint serves the model. It names the scores: serve other weights by another name."""
    ask: Literal["rating", "yes_no", "questions"] = "rating"
    """`rating`: a number on `scale`; `yes_no`: whether the image shows what the prompt says; `questions`: the list
    `questions` of each prompt's metadata, each with the right answer yes (as GenEval 2 asks)."""
    scale: Annotated[tuple[float, float], Field(strict=False)] = (1.0, 5.0)
    """Ends of the scale of a rating, worst and best; the reward is 0 at the first and 1 at the second."""
    mean: Literal["arithmetic", "geometric"] = "arithmetic"
    """Mean over a prompt's questions. `geometric`: one certain no makes the reward 0."""
    template: Annotated[str | None, Affects("speed")] = Field(None, min_length=1)
    """File with the words of a request, with the place {prompt} for the prompt, or for the question. Its content names
    the scores. Unset: words of our own. The words come after the image; where a prompt edits an image, after that one
    and the drawn one."""
    api_key_env: Annotated[str | None, Affects("speed")] = Field(None, min_length=1)
    """Name of the environment variable with the endpoint's key, if the endpoint needs one. The key itself is never
    stored."""
    concurrency: Annotated[int, Affects("speed")] = Field(8, ge=1)
    """Simultaneous requests. 1 or more."""
    timeout: Annotated[float, Affects("speed")] = Field(120.0, gt=0)
    """Seconds to wait for a connection, and for each pause in an answer. Above 0."""
    retries: Annotated[int, Affects("speed")] = Field(4, ge=0)
    """Repetitions of a failed request. 0 or more."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.scale[0] < self.scale[1]:
            raise ValueError("the first number of `scale` must be below the second")
        for key, owner in (("scale", "rating"), ("mean", "questions")):
            # a resolved recipe has every key, and its defaults have no effect
            if getattr(self, key) != type(self).model_fields[key].default and self.ask != owner:
                raise ValueError(f"`{key}` has no meaning for `ask: {self.ask}`: remove it")
        return self


class VlmReward(Reward):
    """Asks a vision-language model, greedily (temperature 0).

    Yes and no are weighed by their probabilities where the server gives them. Details of a score: ``answers``, the
    model's texts, and for questions ``yes``, the number of each.
    """

    name = "vlm"
    purpose = "to please a vision-language model"
    Settings = VlmSettings
    settings: VlmSettings

    def __init__(self, settings: VlmSettings | None = None) -> None:
        super().__init__(settings)
        if self.settings.ask == "questions":
            vars(self)["needs"] = frozenset({"questions"})
        self._checked = False

    @property
    def resources(self) -> Resources:
        """One process that asks."""
        return "server"

    def read_prompt(self, prompt: str, *, target: str | None, metadata: Mapping[str, Any]) -> str | None:
        """Check the questions, where they are asked. Raises ``ValueError``."""
        target = super().read_prompt(prompt, target=target, metadata=metadata)
        if self.settings.ask == "questions":
            _questions(metadata)
        return target

    @cached_property
    def template(self) -> str:
        """The words of a request about an image. Raises ``UserError``."""
        return self._words(rating=RATING, yes_no=YES_NO)

    @cached_property
    def edit_template(self) -> str:
        """The words of a request about an edited image. Raises ``UserError``."""
        return self._words(rating=EDIT_RATING, yes_no=EDIT_YES_NO)

    def _words(self, *, rating: str, yes_no: str) -> str:
        from gdro_cli.rewards.chat import read_template

        settings = self.settings
        if settings.template is not None:
            return read_template(settings.template, key="reward.vlm.template")
        low, high = (f"{end:g}" for end in settings.scale)
        rating = rating.replace("LOW", low).replace("HIGH", high)
        return {"rating": rating, "yes_no": yes_no, "questions": QUESTION}[settings.ask]

    @property
    def version(self) -> Mapping[str, Any]:
        """Provenance: the rule and the digest of the words; the settings name the model and what it is asked.

        Raises:
            UserError: the template cannot be used.
        """
        return {"reward": self.name, "rule": RULE, "prompt_sha256": sha256(self.template.encode())}

    def load(self) -> None:
        """Read the key and check the endpoint; a second call does nothing. Raises ``PrerequisiteError``."""
        if not self._checked:
            asyncio.run(self._check())
            self._checked = True

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        """Score ``images[i]`` for ``prompts[i]``, in order. An image without a usable answer is missing.

        Raises:
            PrerequisiteError: the endpoint refuses the key or lacks the model.
            ValueError: the numbers of images and prompts differ.
        """
        self.load()
        return asyncio.run(self._score_all(list(zip(images, prompts, strict=True))))

    async def _check(self) -> None:
        endpoint = self._endpoint()
        async with endpoint.client:
            await endpoint.check()

    async def _score_all(self, pairs: Sequence[tuple[ImageSource, PromptLike]]) -> list[Score]:
        endpoint, gate = self._endpoint(), asyncio.Semaphore(self.settings.concurrency)
        async with endpoint.client:
            return await asyncio.gather(*(self._score_one(endpoint, gate, *pair) for pair in pairs))

    async def _score_one(
        self, endpoint: Endpoint, gate: asyncio.Semaphore, source: ImageSource, prompt: PromptLike
    ) -> Score:
        from gdro_cli.rewards.base import UnreadableImageError
        from gdro_cli.rewards.chat import filled
        from gdro_cli.rewards.endpoint import NoAnswerError

        questions = _questions(prompt.metadata) if self.settings.ask == "questions" else [prompt.prompt]
        values: list[float] = []
        answers: list[str] = []
        try:
            async with gate:
                images = await asyncio.to_thread(_images, source, prompt)
                template = self.template if len(images) == 1 else self.edit_template
                for question in questions:
                    content: list[dict[str, Any]] = [
                        *({"type": "image_url", "image_url": {"url": url}} for url in images),
                        {"type": "text", "text": filled(template, question)},
                    ]
                    answer = await endpoint.ask(content, max_tokens=self._max_tokens, probabilities=not self._rates)
                    answers.append(answer.text[:_QUOTED])
                    values.append(self._read(answer))
        except (UnreadableImageError, NoAnswerError) as error:
            return Score(None, str(error), {"answers": answers})
        except UnusableAnswerError as error:
            return Score(None, f"the answer {error}", {"answers": answers})
        details = {"answers": answers} | ({"yes": values} if self.settings.ask == "questions" else {})
        return Score(mean_of(values, geometric=self.settings.mean == "geometric"), None, details)

    def _read(self, answer: Answer) -> float:
        if not self._rates:
            return read_yes(answer.text, answer.first)
        if not answer.complete:
            raise UnusableAnswerError("was cut off")
        low, high = self.settings.scale
        return read_rating(answer.text, low=low, high=high)

    @property
    def _rates(self) -> bool:
        return self.settings.ask == "rating"

    @property
    def _max_tokens(self) -> int:
        """A rating may come after some words; yes and no come first."""
        return 512 if self._rates else 16

    def _endpoint(self) -> Endpoint:
        from gdro_cli.rewards.address import read_key
        from gdro_cli.rewards.endpoint import Endpoint, check_base_url, check_package

        check_package("reward.kind vlm")
        settings = self.settings
        return Endpoint(
            check_base_url(settings.base_url, owner=_OWNER),
            settings.model,
            key=read_key(settings.api_key_env, owner=_OWNER),
            timeout=settings.timeout,
            retries=settings.retries,
            owner=_OWNER,
        )

    def __getstate__(self) -> dict[str, Any]:
        """A scoring process checks the endpoint itself."""
        return {**self.__dict__, "_checked": False}


def _images(image: ImageSource, prompt: PromptLike) -> list[str]:
    """The image as a data URL; before it, if the prompt edits an image, that one. Raises ``UnreadableImageError``."""
    from gdro_cli.rewards.base import read_rgb
    from gdro_cli.rewards.png import png_base64

    edited, drawn = prompt.source, read_rgb(image)
    images = [drawn] if edited is None else [edited, drawn]
    return [f"data:image/png;base64,{png_base64(one)}" for one in images]


def _questions(metadata: Mapping[str, Any]) -> list[str]:
    """The questions of a prompt. Raises ``ValueError``."""
    questions = metadata.get("questions")
    if not isinstance(questions, list) or not questions or not all(isinstance(q, str) and q.strip() for q in questions):
        raise ValueError("`questions` must be a list of texts, each a question with the right answer yes")
    return questions
