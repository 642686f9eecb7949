"""Semi-online training: groups that are sampled anew from the trained model, round after round.

The first round learns from the store of the base model. Each later one begins with a store of its own in the run's
folder ``rounds``, sampled with the adapter's average as it is then and scored; the reference stays the base model. This
answers a limitation that the GDRO paper (arXiv 2601.02036) states of offline groups: what they show is what the base
model draws, however far the policy has come.

A round's store depends on the weights at its first step, which a checkpoint of that step keeps. A run that goes on
later in the round finds the store by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save

from gdro_cli.config.recipe import Recipe
from gdro_cli.core.seeds import seed_for
from gdro_cli.data.scores import ScoreTable
from gdro_cli.data.store import GroupStore
from gdro_cli.errors import StoreError
from gdro_cli.files import sha256
from gdro_cli.models.adapters import Ema
from gdro_cli.models.base import FlowModel
from gdro_cli.runtime.distributed import Engine
from gdro_cli.runtime.interrupt import StopFlag
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.runs.store_times import batch_of, note_batch
from gdro_cli.stages.setup.rewards import open_table
from gdro_cli.stages.setup.workspace import SamplingPlan, open_prompts, open_store, store_identity, training_plan
from gdro_cli.stages.training.offline import GroupSteps
from gdro_cli.stages.training.trainer import StepGradient
from gdro_cli.stages.training.training_data import fill_and_score

_STORE = re.compile(r"[a-z0-9][a-z0-9-]*")
ROUNDS = "rounds"
"""Folder of a run's own stores."""
_COMMAND = "gdro train"
"""What makes them and their scores."""


class _Open(NamedTuple):
    """A round that can be worked at."""

    folder: RunFolder
    ema: Ema


def steps_per_round(recipe: Recipe) -> int:
    """Optimizer steps of a round; the last may have fewer."""
    return math.ceil(recipe.train.steps / recipe.train.rounds)


class RefreshedSteps:
    """Each round draws groups from a store of its own; a ``StepSource``."""

    shown: Mapping[str, str] = GroupSteps.shown
    remedy = GroupSteps.remedy

    def __init__(self, recipe: Recipe, model: FlowModel, table: ScoreTable, engine: Engine, reporter: Reporter) -> None:
        self.recipe, self.model, self.engine, self.reporter = recipe, model, engine, reporter
        self._number = 0
        self._steps: GroupSteps | None = GroupSteps(recipe, model, table, engine, reporter)
        self._run: _Open | None = None

    def open(self, stack: ExitStack, folder: RunFolder, ema: Ema) -> None:
        """Remembers where the rounds lie and whose average draws them."""
        self._run = _Open(folder, ema)
        stack.callback(self._close)
        if self._steps is not None:
            self._steps.open(stack, folder, ema)

    def can_go_on_after(self, steps: int) -> bool:
        """Every step is a function of its number and its round's store."""
        return True

    def needs_weights_of(self, steps: int) -> bool:
        """Where a round ends and another begins."""
        return steps % steps_per_round(self.recipe) == 0

    def prepare(self, step: int, stop: StopFlag) -> bool:
        """Sample and score where a round begins; a stop on the way is raised, since the last checkpoint is this one."""
        number = step // steps_per_round(self.recipe)
        if number != self._number or self._steps is None:
            self._close()
            self._steps = None  # frees its images before others are loaded
            table = self._table(number, step, stop)
            self._steps = GroupSteps(self.recipe, self.model, table, self.engine, self.reporter)
            self._number = number
        return True

    def gradient(self, step: int) -> StepGradient:
        """That of the round's groups."""
        if self._steps is None:
            raise RuntimeError("prepare() comes before gradient()")
        return self._steps.gradient(step)

    def _close(self) -> None:
        if self._steps is not None:
            self._steps.close()

    # -- a round ------------------------------------------------------------------------------------------------

    def _table(self, number: int, step: int, stop: StopFlag) -> ScoreTable:
        """The complete store and scores of round ``number`` (from 0)."""
        if self._run is None:
            raise RuntimeError("open() comes before prepare()")
        folder, ema = self._run
        plan = self._plan(number)
        first = number * steps_per_round(self.recipe)
        name = f"round-{number + 1:02d}.json"
        if step > first:  # its weights are gone, but its store was complete
            return self.engine.from_main(lambda: self._kept(folder, name))
        table = self.engine.from_main(lambda: self._opened(self._store(plan, folder, ema)))
        with ema.applied():
            fill_and_score(
                self.recipe,
                self.model,
                table,
                plan,
                self.engine,
                self.reporter,
                stop,
                about=f", round {number + 1} of {self.recipe.train.rounds}",
            )
        with self.engine.together():
            if self.engine.is_main:
                about = {"round": number + 1, "step": first, "store": table.store.path.name}
                folder.write_json(f"{ROUNDS}/{name}", about | {"reward": table.summary().mean})
                note_batch(folder, batch_of(table, step=first), step=first)
        return table

    def _plan(self, number: int) -> SamplingPlan:
        """That of the training store, with other noise in every round."""
        plan = training_plan(self.recipe, self.model)
        return replace(plan, seed=seed_for(plan.seed, "round", number))

    def _store(self, plan: SamplingPlan, folder: RunFolder, ema: Ema) -> GroupStore:
        prompts = open_prompts(self.recipe, self.recipe.prompts.train)
        weights = f"ema {sha256(save(ema.state()))}"
        identity = store_identity(self.recipe, self.model, plan, prompts, weights=weights)
        return open_store(self.recipe, folder.path / ROUNDS, identity, prompts, plan, command=_COMMAND)

    def _opened(self, store: GroupStore) -> ScoreTable:
        return open_table(self.recipe, store, command=_COMMAND)

    def _kept(self, folder: RunFolder, name: str) -> ScoreTable:
        """The store of a round that has begun, which nothing can make again."""
        table = self._opened(GroupStore.open(_held(folder, name), command=_COMMAND))
        if table.store.missing_shards() or table.missing_shards():
            raise StoreError(
                f"the store {table.store.path} of a round of this run is not complete, and the weights that drew it"
                " are gone: delete the run and train it again"
            )
        return table


def _held(folder: RunFolder, name: str) -> Path:
    """Where a round's store lies. Raises StoreError where the file is missing or damaged, or leads out of the run."""
    about = folder.read_object(f"{ROUNDS}/{name}")
    held = str(about.get("store"))
    path = folder.path / ROUNDS / held
    if not _STORE.fullmatch(held) or path.is_symlink():
        raise StoreError(f"{folder.path / ROUNDS / name} names no store of this run: delete the run and train it again")
    return path
