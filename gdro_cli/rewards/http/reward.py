"""The reward ``http``: a server scores the images."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, field_validator

from gdro_cli.config.base import Affects, StrictModel
from gdro_cli.errors import PrerequisiteError
from gdro_cli.identity import differences
from gdro_cli.rewards.base import ImageSource, PromptLike, Resources, Reward, Score, read_needs, within

if TYPE_CHECKING:
    from gdro_cli.rewards.http.client import RewardClient
    from gdro_cli.rewards.http.protocol import Info


class HttpSettings(StrictModel):
    """A server of rewards (docs/reward-servers.md)."""

    url: Annotated[str, Affects("speed")] = Field(min_length=1)
    """Address of the server, without a user name, key or query. Its reward's version names the scores, not its
    address."""
    api_key_env: Annotated[str | None, Affects("speed")] = Field(None, min_length=1)
    """Name of the environment variable with the server's key, if the server needs one. The key itself is never
    stored."""
    scale: Annotated[Annotated[tuple[float, float], Field(strict=False)] | None, Affects("speed")] = None
    """Range of the values, lowest and highest, which names the scores; a value outside is missing. Only a reward from 0
    to 1 has a corrected score. Unset: what the server states. Must be set if the server states none."""
    images_per_request: Annotated[int, Affects("speed")] = Field(8, ge=1, le=256)
    """Images of one request. 1 to 256."""
    concurrency: Annotated[int, Affects("speed")] = Field(4, ge=1)
    """Simultaneous requests. 1 or more."""
    timeout: Annotated[float, Affects("speed")] = Field(120.0, gt=0)
    """Seconds for a whole request, its answer included. Above 0."""
    retries: Annotated[int, Affects("speed")] = Field(4, ge=0)
    """Repetitions of a request that got no answer, or an error that may be temporary. 0 or more. After the last one its
    images have no score."""

    @field_validator("scale")
    @classmethod
    def _check_scale(cls, scale: tuple[float, float] | None) -> tuple[float, float] | None:
        if scale is not None and not scale[0] < scale[1]:
            raise ValueError("the first number must be below the second")
        return scale


class HttpReward(Reward):
    """Asks a server for the scores of images. Its details are those of the server's reward.

    The version of the server's reward names the scores. Every answer states it again, so a server that changes its
    version while images are scored is noticed.
    """

    name = "http"
    purpose = "to please a reward server"
    Settings = HttpSettings
    settings: HttpSettings

    def __init__(self, settings: HttpSettings | None = None) -> None:
        super().__init__(settings)
        self._checked = self._down = False

    @property
    def resources(self) -> Resources:
        """One process that asks."""
        return "server"

    @property
    def scale(self) -> tuple[float, float]:  # type: ignore[override]
        """The range that the recipe states, or else the server. Raises ``PrerequisiteError`` as ``version``."""
        scale: Any = self.settings.scale or self._info.scale
        return scale  # type: ignore[no-any-return]

    def read_prompt(self, prompt: str, *, target: str | None, metadata: Mapping[str, Any]) -> str | None:
        """Check that a prompt carries what the server's reward needs. Raises ``PrerequisiteError`` as ``version``."""
        return read_needs(self._info.needs, prompt, target=target, metadata=metadata)

    @property
    def version(self) -> Mapping[str, Any]:
        """The version of the server's reward. Raises ``PrerequisiteError`` if the server cannot be asked."""
        return {"reward": self.name, "server": dict(self._info.version), "scale": list(self.scale)}

    @cached_property
    def _info(self) -> Info:
        info, own = asyncio.run(self._ask_about_it()), self.settings.scale
        if info.scale is None and own is None:
            raise PrerequisiteError(
                f"the reward server {self.settings.url} does not state a scale: set reward.http.scale to the lowest and"
                " highest value, such as [0, 1]"
            )
        if info.scale is not None and own is not None and info.scale != own:
            raise PrerequisiteError(
                f"the reward of {self.settings.url} has the scale {list(info.scale)}, and reward.http.scale is"
                f" {list(own)}: make them equal"
            )
        return info

    def load(self) -> None:
        """Check that the server still has the reward that ``version`` named. Raises ``PrerequisiteError``."""
        if not self._checked:
            self._compare(asyncio.run(self._ask_about_it()).version)
            self._checked = True

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        """Score ``images[i]`` for ``prompts[i]``, in order. An image that the server does not score is missing.

        Raises:
            PrerequisiteError: the server refuses the key or the address, or has another version than before.
            ValueError: the numbers of images and prompts differ.
        """
        self.load()
        return asyncio.run(self._score_all(list(zip(images, prompts, strict=True))))

    async def _ask_about_it(self) -> Info:
        client = self._client()
        async with client.connections:
            return await client.info()

    async def _score_all(self, pairs: Sequence[tuple[ImageSource, PromptLike]]) -> list[Score]:
        """All scores. A refusal is raised at once: ``asyncio.run`` cancels the other requests and retries."""
        size, client = self.settings.images_per_request, self._client()
        gate = asyncio.Semaphore(self.settings.concurrency)

        async def score_some(part: Sequence[tuple[ImageSource, PromptLike]]) -> list[Score]:
            async with gate:
                return await self._score_some(client, part)

        async with client.connections:
            parts = await asyncio.gather(*(score_some(pairs[i : i + size]) for i in range(0, len(pairs), size)))
        return [score for part in parts for score in part]

    async def _score_some(self, client: RewardClient, pairs: Sequence[tuple[ImageSource, PromptLike]]) -> list[Score]:
        from gdro_cli.rewards.http.client import NoAnswerError
        from gdro_cli.rewards.http.protocol import BadAnswerError, read_answer, request_body

        images, scores = await asyncio.to_thread(_encode, [image for image, _ in pairs])
        if images:
            prompts = [pairs[index][1] for index in images]
            body = request_body(list(images.values()), prompts, await asyncio.to_thread(_sources, prompts))
            try:
                # a server that has just been down for all attempts is not waited for again
                answer = await client.ask(body, attempts=1 if self._down else 1 + self.settings.retries)
                self._down = False
                version, given = read_answer(answer, count=len(images), key=client.key)
                self._compare(version)
                remedy = "correct reward.http.scale, or the server"
                measured = [within(score, self.scale, who="the reward server", remedy=remedy) for score in given]
            except NoAnswerError as error:
                self._down |= error.down
                measured = [Score(None, str(error))] * len(images)
            except BadAnswerError as error:
                measured = [Score(None, f"the reward server's answer {error}")] * len(images)
            scores |= dict(zip(images, measured, strict=True))
        return [scores[index] for index in range(len(pairs))]

    def _compare(self, version: Any) -> None:
        expected = dict(self._info.version)
        if version != expected:
            changes = differences(expected, version) if isinstance(version, dict) else "an answer without a version"
            text = changes if isinstance(changes, str) else ", ".join(map(str, changes))[:400]
            raise PrerequisiteError(
                f"the reward server {self.settings.url} has another version than before ({text}): run the command"
                " again, which scores with the new version"
            )

    def _client(self) -> RewardClient:
        from gdro_cli.rewards.address import check_url, read_key
        from gdro_cli.rewards.http.client import RewardClient

        settings = self.settings
        url = check_url(
            settings.url,
            what="reward.http.url",
            example="http://localhost:8000",
            variable="reward.http.api_key_env",
        )
        key = read_key(settings.api_key_env, owner="the reward server's")
        return RewardClient(url, key=key, timeout=settings.timeout)

    def __getstate__(self) -> dict[str, Any]:
        """A scoring process checks the server itself."""
        return {**self.__dict__, "_checked": False}


def _sources(prompts: Sequence[PromptLike]) -> list[str | None]:
    """The images that prompts edit as PNG in base64; None for a prompt that edits none."""
    from gdro_cli.rewards.png import png_base64

    sources = [prompt.source for prompt in prompts]
    return [None if source is None else png_base64(source) for source in sources]


def _encode(sources: Sequence[ImageSource]) -> tuple[dict[int, str], dict[int, Score]]:
    """The images as PNG in base64, and the scores of those that cannot be decoded, by index."""
    from gdro_cli.rewards.base import read_all
    from gdro_cli.rewards.png import png_base64

    readable, reasons = read_all(sources)
    texts = {index: png_base64(image) for index, image in readable.items()}
    return texts, {index: Score(None, reason) for index, reason in reasons.items()}
