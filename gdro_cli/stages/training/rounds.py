"""Semi-online training: each round samples new groups from the trained model.

The first round learns from the base model's store. Each later round samples and scores a store of its own in the run's
folder ``rounds``, with the adapter's average at the start of the round; the reference stays the base model. This
answers a limitation of offline groups that the GDRO paper (arXiv 2601.02036) states: they show what the base model
draws, however far the policy has moved.

A round's store depends on the weights at its first step, which a checkpoint of that step keeps. A run that resumes
later in the round looks the store up by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save

from gdro_cli.config.recipe import Recipe
from gdro_cli.core.seeds import seed_for
from gdro_cli.data.scores import ScoreTable
from gdro_cli.data.store import GroupStore
from gdro_cli.errors import StoreError
from gdro_cli.files import sha256
from gdro_cli.models.adapters import Ema
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.runs.store_times import batch_of, note_batch
from gdro_cli.stages.sampling.fill_store import fill_store
from gdro_cli.stages.scoring.fill_table import score_with_reward
from gdro_cli.stages.setup.scorers import open_reward_table
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import SamplingPlan, open_store, training_plan
from gdro_cli.stages.training.micro_batch import MicroBatch
from gdro_cli.stages.training.offline import GroupSteps
from gdro_cli.stages.training.step_source import ResumePoint, StepGradient

ROUNDS = "rounds"
"""Folder of a run's own stores."""
_STORE = re.compile(r"[a-z0-9][a-z0-9-]*")
_COMMAND = "gdro train"
"""Makes the rounds' stores and scores."""


def steps_per_round(recipe: Recipe) -> int:
    """Optimizer steps of a round; the last may have fewer."""
    return math.ceil(recipe.train.steps / recipe.train.rounds)


class RoundSteps:
    """Each round draws groups from a store of its own; a ``StepSource``."""

    progress_metrics: Mapping[str, str] = GroupSteps.progress_metrics
    remedy = GroupSteps.remedy
    _folder: RunFolder
    _ema: Ema

    def __init__(self, session: Session, table: ScoreTable) -> None:
        self.session = session
        self._round_steps = steps_per_round(session.recipe)
        self._number = 0
        self._micro = MicroBatch(session)
        self._steps: GroupSteps | None = GroupSteps(session, table, self._micro)

    def open(self, stack: ExitStack, folder: RunFolder, ema: Ema) -> None:
        """Take the folder of the rounds and the average that draws their images."""
        self._folder, self._ema = folder, ema
        stack.callback(self._close)
        if self._steps is not None:
            self._steps.open(stack, folder, ema)

    def resume_point(self, steps: int) -> ResumePoint:
        """Needed where a round begins: the weights of that step draw the images of all its steps."""
        return ResumePoint.POSSIBLE if steps % self._round_steps else ResumePoint.NEEDED

    def prepare(self, step: int) -> bool:
        """Sample and score if a round begins here. A stop raises Interrupted: this step already has its checkpoint."""
        number = step // self._round_steps
        if number != self._number or self._steps is None:
            self._close()
            self._steps = None  # frees its images before others are loaded
            self._steps = GroupSteps(self.session, self._table(number, step), self._micro, round_number=number)
            self._number = number
        return True

    def gradient(self, step: int) -> StepGradient:
        """The gradient of the round's groups."""
        if self._steps is None:
            raise RuntimeError("call prepare() before gradient()")
        return self._steps.gradient(step)

    def shrink(self) -> None:
        """Halve the micro-batch."""
        if self._steps is not None:
            self._steps.shrink()

    def _close(self) -> None:
        if self._steps is not None:
            self._steps.close()

    # -- a round ------------------------------------------------------------------------------------------------

    def _table(self, number: int, step: int) -> ScoreTable:
        """The complete store and scores of round ``number`` (from 0)."""
        engine, first, name = self.session.engine, number * self._round_steps, f"round-{number + 1:02d}.json"
        if step > first:  # the weights that drew the store are gone, but it was complete
            return engine.from_main(lambda: self._finished_table(name))
        plan = training_plan(self.session)
        plan = replace(plan, seed=seed_for(plan.seed, "round", number))  # other noise in every round
        table = engine.from_main(lambda: self._open_table(self._open_store(plan)))
        with self._ema.applied():
            rounds = self.session.recipe.train.rounds
            suffix = f", round {number + 1} of {rounds}"
            fill_store(self.session, table.store, plan, label=f"sampling{suffix}")
            score_with_reward(self.session, table, label=f"scoring{suffix}")
        with engine.together():
            if engine.is_main:
                about = {"round": number + 1, "step": first, "store": table.store.path.name}
                self._folder.write_json(f"{ROUNDS}/{name}", about | {"reward": table.summary().mean})
                note_batch(self._folder, batch_of(table, step=first), step=first)
        return table

    def _open_store(self, plan: SamplingPlan) -> GroupStore:
        weights = f"ema {sha256(save(self._ema.state()))}"
        folder, prompts = self._folder.path / ROUNDS, self.session.prompts("train")
        return open_store(self.session, folder, plan, prompts, weights=weights, command=_COMMAND)

    def _open_table(self, store: GroupStore) -> ScoreTable:
        return open_reward_table(self.session, store, command=_COMMAND)

    def _finished_table(self, name: str) -> ScoreTable:
        """The scores of a round that has begun, which nothing can make again."""
        table = self._open_table(GroupStore.open(_store_of(self._folder, name), command=_COMMAND))
        if table.store.missing_shards() or table.missing_shards():
            raise StoreError(
                f"the store {table.store.path} of a round of this run is not complete, and the weights that drew it"
                " are gone: delete the run and train it again"
            )
        return table


def _store_of(folder: RunFolder, name: str) -> Path:
    """A round's store. Raises StoreError if the round's file is missing or damaged, or names no store of this run."""
    store = str(folder.read_object(f"{ROUNDS}/{name}").get("store"))
    path = folder.path / ROUNDS / store
    if not _STORE.fullmatch(store) or path.is_symlink():
        raise StoreError(f"{folder.path / ROUNDS / name} names no store of this run: delete the run and train it again")
    return path
