"""Rewards that load at once and fail in the ways that real ones may; the image's width says how."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.rewards.base import ImageSource, PromptLike, Score, UnreadableImageError, read_rgb

KILLS = 13
RAISES = 17
KILLS_ONCE = 19
HANGS = 23
WITHOUT_TARGET = "no target"


class WidthReward:
    """The score of an image is its width."""

    def __init__(self, marks: Path | None = None) -> None:
        self._marks = marks

    @property
    def version(self) -> Mapping[str, Any]:
        return {"reward": "width"}

    def load(self) -> None:
        pass

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        for prompt in prompts:
            if prompt.prompt == WITHOUT_TARGET:
                raise UserError("the prompt has no target")
        return [self._one(image) for image in images]

    def _one(self, source: ImageSource) -> Score:
        try:
            width = read_rgb(source).width
        except UnreadableImageError as error:
            return Score(None, str(error))
        if width == RAISES:
            raise RuntimeError("seventeen")
        if width == KILLS or (width == KILLS_ONCE and self._first_time()):
            os.kill(os.getpid(), signal.SIGKILL)
        if width == HANGS:
            assert self._marks is not None
            (self._marks / "hangs").touch()
            time.sleep(3600)
        return Score(float(width), None, {"pid": os.getpid()})

    def _first_time(self) -> bool:
        assert self._marks is not None
        mark = self._marks / "killed"
        new = not mark.exists()
        mark.touch()
        return new


class ThreadsReward(WidthReward):
    """The score is the number of threads that torch uses, which it reads when it is imported; unpickling imports it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        import torch

        self.__dict__ |= state
        self._threads = torch.get_num_threads()

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        return [Score(float(self._threads)) for _ in images]


class GpuReward(WidthReward):
    """Its details hold the GPUs that its process sees."""

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        return [Score(0.0, None, {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}) for _ in images]


class OtherTypes(WidthReward):
    """It gives numbers in place of scores."""

    def score(self, images: Sequence[ImageSource], prompts: Sequence[PromptLike]) -> list[Score]:
        return [0.5 for _ in images]  # type: ignore[misc]


class NotFinite(WidthReward):
    """It divides by zero on one image."""

    def _one(self, source: ImageSource) -> Score:
        score = super()._one(source)
        return Score(float("nan")) if score.value == RAISES + 1 else score


class Unloadable(WidthReward):
    """Its weights are missing."""

    def load(self) -> None:
        raise PrerequisiteError("the weights are missing")


class DiesWhileLoading(WidthReward):
    """Its libraries crash."""

    def load(self) -> None:
        os._exit(3)


class StartsOnce(WidthReward):
    """The operating system refuses its second process; unpickled in a worker, it has been started."""

    def __init__(self) -> None:
        super().__init__()
        self._started = False

    def __getstate__(self) -> dict[str, Any]:
        if self._started:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self._started = True
        return self.__dict__
