"""Gradients from rounds of fresh images: Flow-GRPO (arXiv 2505.05470) and DanceGRPO (arXiv 2505.07818).

A round draws groups of images with the current policy, scores them, and turns the rewards into advantages. Its
optimizer steps then raise the likelihood of the sampling steps that led to better images of a group, and lower that of
the others. A round is a function of its number and the weights at its start, so a run resumes bit-exactly from the end
of any round.

docs/baselines.md lists what differs from the public code.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from gdro_cli.core.policy import clipped_surrogate, group_advantages, group_std
from gdro_cli.core.sde import log_prob, step_kl
from gdro_cli.core.seeds import generator
from gdro_cli.data.scores import ScoreRow
from gdro_cli.errors import StoreError
from gdro_cli.models.adapters import Ema, reference
from gdro_cli.models.base import Conditioning
from gdro_cli.rewards.pool import Pool, ScoringStopped
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.scoring.score_rows import score_images, why_none
from gdro_cli.stages.setup.scorers import open_reward_pool
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.sources import encode_prompts
from gdro_cli.stages.training.batch_sizes import check_shares, micro_batch
from gdro_cli.stages.training.micro_batch import MicroBatch
from gdro_cli.stages.training.rollout import (
    Policy,
    Rollout,
    RolloutImage,
    policy_guidance,
    prompts_of_round,
    roll_out,
    trained_steps,
)
from gdro_cli.stages.training.step_source import ResumePoint, StepGradient

_SUMS = ("loss", "ratio_mean", "clip_fraction", "approx_kl", "kl")
"""Metrics of an update, each a mean over (image, sampling step)."""


@dataclass(frozen=True, slots=True)
class Round:
    """A scored rollout: this process's images, and the advantages of the images of all processes."""

    number: int
    rollout: Rollout
    steps: Tensor
    """Trained sampling steps of this process's images [N, M]."""
    conditioning: Conditioning
    """Batched by prompt."""
    advantages: Tensor
    """[B * K] of the images of all processes, in the order of the prompts."""
    first: int
    """Index of this process's first image in ``advantages``."""
    metrics: Mapping[str, float]
    seconds: Mapping[str, float]


class OnlineSteps:
    """Each step learns from a part of the current round's images; a ``StepSource``."""

    pool: Pool
    """From ``open`` on."""

    progress_metrics: Mapping[str, str] = {"reward": "reward", "clip_fraction": "clipped", "ratio_mean": "ratio"}
    remedy = "lower train.lr"

    def __init__(self, session: Session) -> None:
        recipe, method = session.recipe, session.recipe.online_method
        if method is None:
            raise TypeError(f"{recipe.method.name} is not an online method")
        check_shares(recipe, session.engine.world)
        self.session, self.model, self.engine, self.method = session, session.model, session.engine, method
        self.seed = recipe.train_seed
        self.prompts = session.prompts("train").records
        self.policy = Policy(
            model=session.model,
            method=method,
            guidance=policy_guidance(recipe, method),
            size=session.image_size,
        )
        self._micro = MicroBatch(session)
        self.conditioning: dict[str, Conditioning] = {}
        self.round: Round | None = None

    def open(self, stack: ExitStack, folder: RunFolder, ema: Ema) -> Pool:
        """Encode the prompts and start the scoring processes, which end with ``stack``."""
        texts = encode_prompts(self.model, self.prompts)
        self.conditioning = {prompt.id: text for prompt, text in zip(self.prompts, texts, strict=True)}
        self.model.release_encoders()
        self.pool = stack.enter_context(open_reward_pool(self.session))
        return self.pool

    def resume_point(self, steps: int) -> ResumePoint:
        """Possible at the end of a round only: later the weights that drew its images are gone."""
        return ResumePoint.NONE if steps % self.method.steps_per_round else ResumePoint.POSSIBLE

    def prepare(self, step: int) -> bool:
        """Draw and score a round if one begins here; False if a stop was requested before it was complete."""
        number = step // self.method.steps_per_round
        if self.round is None or self.round.number != number:
            self.round = None  # frees its memory before the next round is made
            with suppress(ScoringStopped):
                self.round = self._make_round(number)
        return self.round is not None

    # -- a round ------------------------------------------------------------------------------------------------

    def _make_round(self, number: int) -> Round:
        """Draw and score a round. Raises ScoringStopped, in all processes, if a stop was requested in any."""
        method, engine = self.method, self.engine
        start = time.perf_counter()
        visits = prompts_of_round(self.prompts, number, count=method.prompts_per_round, seed=self.seed)
        share = len(visits) // engine.world
        own = visits[engine.rank * share : (engine.rank + 1) * share]
        names = [RolloutImage(prompt, visit, image) for prompt, visit in own for image in range(method.group_size)]
        rollout, images = self._draw(names)
        sampled = time.perf_counter()
        rewards = self._rewards(names, images, number)
        seconds = {"sampling": sampled - start, "scoring": time.perf_counter() - sampled}
        advantages = group_advantages(rewards, scale=method.advantage_std, clip=method.advantage_clip).float()
        first = number * method.steps_per_round
        updates = min(method.steps_per_round, self.session.recipe.train.steps - first)
        return Round(
            number=number,
            rollout=rollout,
            steps=trained_steps(method, names, seed=self.seed),
            conditioning=self.model.batch_conditioning([self.conditioning[prompt.id] for prompt, _ in own]),
            advantages=advantages.flatten(),
            first=engine.rank * len(names),
            metrics={"round": number + 1, **_reward_metrics(rewards, advantages)},
            seconds={name: value / updates for name, value in seconds.items()},
        )

    def _draw(self, names: list[RolloutImage]) -> tuple[Rollout, list[Image.Image | None]]:
        """Latents and images of this process."""
        size = self.session.recipe.sample.batch_size
        height, width = self.policy.size
        parts: list[Rollout] = []
        for start in range(0, len(names), size):
            if self.engine.hear(self.session.stop):  # all processes have the same number of batches
                raise ScoringStopped
            batch = names[start : start + size]
            texts = [self.conditioning[name.prompt.id] for name in batch]
            parts.append(roll_out(self.policy, batch, texts, seed=self.seed))
        # Only now: with model.offload the decoder takes the transformer's place on the device.
        images = [image for part in parts for image in self.model.decode(part.clean, height=height, width=width)]
        return Rollout.joined(parts), images

    def _rewards(self, names: list[RolloutImage], images: list[Image.Image | None], number: int) -> Tensor:
        """Rewards [B, K] of the images of all processes, nan where missing."""
        detail = self.session.reward.trained_on
        rows: list[ScoreRow] = []
        slots = [(name.prompt, name.image) for name in names]
        with self.engine.together(), suppress(ScoringStopped):
            rows = score_images(self.pool, images, slots, stop=self.session.stop)
        if self.engine.any(not rows):
            raise ScoringStopped
        values = [row.measured(detail) for row in rows]
        own = [(math.nan if value is None else value, row.reason) for value, row in zip(values, rows, strict=True)]
        gathered = self.engine.gather_objects(own)
        rewards = torch.tensor([value for value, _ in gathered], dtype=torch.float64)
        if rewards.isnan().all():
            raise StoreError(
                f"none of the {len(gathered)} images of round {number + 1} could be scored"
                f" {why_none(reason for _, reason in gathered)}"
            )
        rewards = rewards.view(self.method.prompts_per_round, self.method.group_size)
        return self._shuffled(rewards, number) if self.session.recipe.train.shuffle_rewards else rewards

    def _shuffled(self, rewards: Tensor, number: int) -> Tensor:
        """The control experiment: rewards permuted among the scored images of each group."""
        result = rewards.clone()
        for group, row in enumerate(result):
            scored = (~row.isnan()).nonzero().flatten()
            order = torch.randperm(len(scored), generator=generator(self.seed, "shuffled rewards", number, group))
            row[scored] = row[scored[order]]
        return result

    # -- an update ----------------------------------------------------------------------------------------------

    def gradient(self, step: int) -> StepGradient:
        """The gradient of this process's images of the step's part of the round."""
        current = self.round
        if current is None:
            raise RuntimeError("call prepare() before gradient()")
        epoch, part = divmod(step % self.method.steps_per_round, self.method.updates_per_round)
        chosen = self._part(current, epoch, part)
        own = chosen[(chosen >= current.first) & (chosen < current.first + len(current.steps))] - current.first
        total = len(chosen) * current.steps.shape[1]
        sums = torch.zeros(len(_SUMS), device=self.model.device)
        images = own.repeat(current.steps.shape[1])  # one step of every image, then the next
        steps = current.steps[own].T.flatten()
        size = micro_batch(self.session.recipe) or max(1, len(own))
        starts = range(0, len(images), size)
        with self._micro.trial():
            for start in starts:
                micro = slice(start, start + size)
                sums += self._backward(current, images[micro], steps[micro], total)
        sound = current.rollout.states.isfinite().flatten(1).all(1).float().argmax().view(1).cpu()  # nan times 0 is nan
        for _ in range(self._idle_passes(len(starts))):
            self._backward(current, sound, current.steps[sound, 0], total, weight=0.0)
        means = (self.engine.sum(sums) / max(1, total)).tolist()
        metrics = dict(zip(_SUMS, means, strict=True))
        if not self.method.beta_kl:
            del metrics["kl"]
        metrics |= {"images": len(chosen), **current.metrics, **self._micro.metrics}
        return StepGradient(metrics, learns=total > 0, seconds=current.seconds)

    def shrink(self) -> None:
        """Halve the micro-batch."""
        self._micro.halve()

    def _part(self, current: Round, epoch: int, part: int) -> Tensor:
        """The images of one update in all processes: a random part of those whose advantage is not 0."""
        kept = current.advantages.nonzero().flatten()
        order = torch.randperm(len(kept), generator=generator(self.seed, "parts of a round", current.number, epoch))
        return kept[order].tensor_split(self.method.updates_per_round)[part]

    def _idle_passes(self, passes: int) -> int:
        """How many passes a process must add to its own: the passes of a sharded model take all processes."""
        if self.session.recipe.model.sharding == "none":
            return 0
        return self.engine.largest(passes) - passes

    def _backward(self, current: Round, images: Tensor, steps: Tensor, total: int, *, weight: float = 1.0) -> Tensor:
        """Add the gradient of some (image, sampling step) pairs [n]; returns the sums of their metrics."""
        device, method = self.model.device, self.method
        i, s = images.to(device), steps.to(device)
        group = i // method.group_size
        conditioning = {key: value[group] for key, value in current.conditioning.items()}
        before, after = current.rollout.states[i, s], current.rollout.states[i, s + 1]
        old, advantage = current.rollout.log_probs[i, s], current.advantages[current.first + images].to(device)
        step = self.policy.step(before, s, conditioning)
        new = log_prob(after, step)
        surrogate = clipped_surrogate(new, old, advantage, clip_range=method.clip_range)
        loss, kl = surrogate.loss, torch.zeros_like(surrogate.loss)
        if method.beta_kl:
            with torch.no_grad(), reference(self.model):
                mean = self.policy.step(before, s, conditioning).mean
            kl = step_kl(step, mean)
            loss = loss + method.beta_kl * kl
        self.engine.backward(weight * loss.sum() / total)
        approx = 0.5 * (new - old).square()
        return torch.stack([x.detach().sum() for x in (loss, surrogate.ratio, surrogate.clipped.float(), approx, kl)])


def _reward_metrics(rewards: Tensor, advantages: Tensor) -> dict[str, float]:
    """Metrics of a round's rewards [B, K]."""
    return {
        "reward": float(rewards[~rewards.isnan()].mean()),
        "reward_group_std": float(group_std(rewards).nanmean()),
        "no_advantage": float((advantages == 0)[~rewards.isnan()].float().mean()),
        "failed": int(rewards.isnan().sum()),
    }
