"""Evaluation points during training: the reward on the validation prompts, with the weights that would be exported.

Settings may be chosen by these numbers; the held-out prompts of ``gdro eval`` stay unseen until then.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import astuple, dataclass

from gdro_cli.config.base import digest
from gdro_cli.config.recipe import Recipe
from gdro_cli.data.prompts import PromptSet
from gdro_cli.data.scores import ScoreRow
from gdro_cli.errors import StoreError
from gdro_cli.models.base import Conditioning, FlowModel
from gdro_cli.rewards.pool import ScoringPool
from gdro_cli.stages.rewards import Measure, measured, measures, open_pool, trained_detail
from gdro_cli.stages.sample import decode_images, sample_images
from gdro_cli.stages.workspace import SamplingPlan, evaluation_plan, open_prompts


@dataclass(frozen=True, slots=True)
class Validation:
    """Samples and scores the validation prompts; they are encoded once and the scoring processes stay up."""

    recipe: Recipe
    model: FlowModel
    prompts: PromptSet
    plan: SamplingPlan
    conditioning: list[Conditioning]
    pool: ScoringPool

    @classmethod
    def open(cls, recipe: Recipe, model: FlowModel, stack: ExitStack) -> Validation:
        """Encode the prompts and start the scoring processes, which end with ``stack``."""
        prompts = open_prompts(recipe, recipe.prompts.validation)
        plan = evaluation_plan(recipe, model, images_per_prompt=recipe.eval.validation_images_per_prompt)
        conditioning = model.encode([prompt.prompt for prompt in prompts.records])
        model.release_encoders()
        return cls(recipe, model, prompts, plan, conditioning, stack.enter_context(open_pool(recipe)))

    @property
    def protocol(self) -> str:
        """Digest of what two points must share to be compared."""
        return digest([*astuple(self.plan), self.prompts.digest, self.recipe.eval.weights])

    def measure(self) -> dict[str, float | int | str]:
        """Return mean reward, its 95 % interval, and counts, for the adapter as it is now.

        Raises:
            StoreError: no image could be scored.
        """
        began = time.perf_counter()
        seeds = [
            [self.plan.image_seed(prompt.id, index) for index in range(self.plan.images_per_prompt)]
            for prompt in self.prompts.records
        ]
        size = self.recipe.sample.batch_size
        latents = sample_images(self.model, self.conditioning, seeds, self.plan, batch_size=size)
        pictures = decode_images(self.model, latents, self.plan, batch_size=size)
        asked = [prompt for prompt, group in zip(self.prompts.records, seeds, strict=True) for _ in group]
        scores = self.pool.score(pictures, asked)
        if all(score.value is None for score in scores):
            raise StoreError(f"none of the {len(scores)} validation images could be scored: mend the reward engine")
        count = self.plan.images_per_prompt
        rows = [
            ScoreRow(prompt.id, place % count, score.value, score.reason, score.details)
            for place, (prompt, score) in enumerate(zip(asked, scores, strict=True))
        ]
        samples = self.recipe.eval.bootstrap
        reward = Measure("reward", trained_detail(self.recipe))
        interval = measured(reward, self.prompts.records, rows).interval(samples=samples)
        headline = measures(self.recipe)[0]
        return {
            "protocol": self.protocol,
            "reward": interval.mean,
            "low": interval.low,
            "high": interval.high,
            headline.name: measured(headline, self.prompts.records, rows).interval(samples=samples).mean,
            "prompts": interval.prompts,
            "images": interval.images,
            "failed": sum(row.value is None for row in rows),
            "seconds": time.perf_counter() - began,
        }
