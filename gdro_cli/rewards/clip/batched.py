"""Rewards whose network scores several images in one pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gdro_cli.errors import GdroError
from gdro_cli.rewards.base import ImageSource, PromptLike, Resources, Reward, Score, one_line, read_all

if TYPE_CHECKING:
    from PIL import Image


class BatchedReward(Reward):
    """A large network: one process scores, on the GPU if there is one. A subclass implements ``values``."""

    @property
    def resources(self) -> Resources:
        """The device."""
        return "device"

    @abstractmethod
    def values(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Sequence[float]:
        """The rewards of RGB images for the texts of their prompts, in order."""

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        """Score ``images[i]`` for ``prompts[i]``, in order. A batch that fails is repeated image by image.

        Raises:
            PrerequisiteError: the network cannot be loaded.
            ValueError: the numbers of images and prompts differ.
        """
        texts = [prompt.prompt for _, prompt in zip(images, prompts, strict=True)]
        self.load()
        readable, reasons = read_all(images)
        scores = {index: Score(None, reason) for index, reason in reasons.items()}
        batch = self._scores(list(readable.values()), [texts[index] for index in readable])
        scores |= dict(zip(readable, batch, strict=True))
        return [scores[index] for index in range(len(images))]

    def _scores(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[Score]:
        if not images:
            return []
        try:
            return [Score(value) for value in self.values(images, texts)]
        except GdroError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a network raises concerns one image of the batch
            if len(images) == 1:
                return [Score(None, f"the reward {self.name} failed on this image: {one_line(error)}")]
            pairs = zip(images, texts, strict=True)
            return [score for image, text in pairs for score in self._scores([image], [text])]
