"""``gdro rewards check``: one reward scores a few images, twice, in processes of its own."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gdro_cli.config.prompt_sets import fitting_sets
from gdro_cli.config.sections import PromptSource, RewardSection
from gdro_cli.data.prompts import load_prompts
from gdro_cli.data.records import PromptRecord
from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.identity import canonical_json
from gdro_cli.images import suffixes
from gdro_cli.rewards.base import OUTSIDE, ImageSource, Reward, Score
from gdro_cli.rewards.registry import open_reward, provenance
from gdro_cli.stages.setup.scorers import make_reward_pool

_MOST = 16
"""Images that are scored."""
_DRAWN = 8
_SIDE = 128


@dataclass(frozen=True, slots=True)
class RewardCheck:
    """What was found."""

    reward: Reward
    version: Mapping[str, Any]
    scores: list[Score]
    again: list[Score]
    """By another process."""
    load_seconds: float
    """From the start of a process to its first score."""
    image_seconds: float
    peak_bytes: int | None
    """Most memory of a process; None where the system does not say."""

    @property
    def values(self) -> list[float]:
        """The scores that are not missing."""
        return [score.value for score in self.scores if score.value is not None]

    @property
    def problem(self) -> str | None:
        """Why the reward cannot be trained on, a sentence."""
        name = self.reward.name
        if not self.values:
            return f"the reward {name} scored none of {len(self.scores)} images ({self.scores[0].reason})"
        if self._disagreement is not None:
            one, other = self.scores[self._disagreement], self.again[self._disagreement]
            return (
                f"two runs of the reward {name} do not agree: image {self._disagreement} got {_shown(one)} and then"
                f" {_shown(other)}; equal versions must give equal scores"
            )
        return next((score.reason for score in self.scores if OUTSIDE in (score.reason or "")), None)

    @property
    def _disagreement(self) -> int | None:
        """The first image with two values, or with a value in only one of the runs."""
        pairs = enumerate(zip(self.scores, self.again, strict=True))
        return next((index for index, (one, other) in pairs if one.value != other.value), None)

    @property
    def _note(self) -> str | None:
        """A detail that the two runs do not share; it may be a time."""
        for index, (one, other) in enumerate(zip(self.scores, self.again, strict=True)):
            for key in sorted(one.details.keys() | other.details.keys()):
                if one.details.get(key) != other.details.get(key):
                    return f"the detail {key} of image {index} differs between the two runs"
        return None

    @property
    def summary(self) -> dict[str, str]:
        """What the command line prints."""
        values, missing = self.values, Counter(score.reason for score in self.scores if score.value is None)
        low, high = self.reward.scale
        rows = {
            **{f"version: {key}": canonical_json([value])[1:-1] for key, value in self.version.items()},
            "scale": f"{low:g} to {high:g}",
            "images scored": f"{len(values)} of {len(self.scores)}",
        }
        if values:
            rows["values"] = f"{min(values):.4g} to {max(values):.4g}, mean {math.fsum(values) / len(values):.4g}"
        rows |= {f"missing, {count} x": str(reason) for reason, count in missing.items()}
        rows |= {
            "two runs": "agree" if self._disagreement is None else "differ",
            **({} if self._note is None else {"note": self._note}),
            "time to the first score": f"{self.load_seconds:.2f} s",
            "time per image": f"{1000 * self.image_seconds:.1f} ms",
        }
        return rows if self.peak_bytes is None else rows | {"memory of a process": f"{self.peak_bytes / 2**30:.2f} GiB"}


def run(section: RewardSection, *, images: Path | None = None, prompts: Path | None = None) -> RewardCheck:
    """Score a few images with a reward, in two processes one after the other.

    Args:
        section: names the reward, and has its settings.
        images: a folder of images. Default: drawn ones.
        prompts: a prompt file; image i gets prompt i. Default: built-in prompts that the reward can use.

    Raises:
        UserError: there are no such images or prompts.
        PrerequisiteError: the reward cannot be used.
    """
    reward = open_reward(section)
    version = provenance(reward)
    records = _prompts(reward, prompts)
    sources: Sequence[ImageSource] = _drawn(records) if images is None else _in_folder(images)
    asked = [records[index % len(records)] for index in range(len(sources))]
    runs: list[list[Score]] = []
    times: list[tuple[float, float]] = []
    peak = None
    for _ in range(2):
        with make_reward_pool(reward, section.model_copy(update={"workers": 1}), cores=1) as pool:
            start = time.perf_counter()
            pool.score(sources[:1], asked[:1])
            loaded = time.perf_counter()
            runs.append(pool.score(sources, asked))
            times.append((loaded - start, (time.perf_counter() - loaded) / len(sources)))
            peak = max(filter(None, map(_peak_bytes, pool.pids)), default=None)
    return RewardCheck(reward, version, runs[0], runs[1], times[0][0], times[0][1], peak)


def _prompts(reward: Reward, file: Path | None) -> tuple[PromptRecord, ...]:
    if file is not None:
        return load_prompts(PromptSource(file=str(file)), reward=reward).records[:_MOST]
    for name in fitting_sets(reward.needs):
        try:
            return load_prompts(PromptSource(builtin=name, count=_DRAWN), reward=reward).records
        except UserError:
            continue
    needs = ", ".join(sorted(reward.needs)) or "see its documentation"
    raise UserError(
        f"no built-in prompts have what the reward {reward.name} needs ({needs}): name a file with --prompts"
    )


def _in_folder(folder: Path) -> list[ImageSource]:
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes())
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): name a folder of images") from error
    if not files:
        raise UserError(f"{folder} has no images: name a folder of images")
    return list(files[:_MOST])


def _drawn(prompts: Sequence[PromptRecord]) -> list[ImageSource]:
    """Images that differ: noise over a colour, with the text that a prompt asks for."""
    random, font = np.random.default_rng(0), ImageFont.load_default(size=28)
    images: list[ImageSource] = []
    for number in range(_DRAWN):
        colour = random.integers(0, 256, 3)
        pixels = np.clip(colour + random.normal(0, 8 * number, (_SIDE, _SIDE, 3)), 0, 255)
        image = Image.fromarray(pixels.astype(np.uint8))
        if text := prompts[number % len(prompts)].target:
            ink = "black" if colour.mean() > 127 else "white"
            ImageDraw.Draw(image).text((_SIDE / 2, _SIDE / 2), text, fill=ink, font=font, anchor="mm")
        images.append(image)
    return images


def _peak_bytes(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def refuse(check: RewardCheck) -> None:
    """Raise ``PrerequisiteError`` if the reward cannot be trained on."""
    if check.problem is not None:
        raise PrerequisiteError(check.problem)


def _shown(score: Score) -> str:
    return "no score" if score.value is None else f"{score.value!r}"
