"""A session: one command at work on one recipe, with everything that the recipe names."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from gdro_cli.config.recipe import Recipe
from gdro_cli.data.prompts import PromptSet, load_prompts
from gdro_cli.data.store import GroupStore
from gdro_cli.errors import UserError
from gdro_cli.models.base import FlowModel
from gdro_cli.rewards.base import Reward
from gdro_cli.rewards.judge.base import JudgeReward
from gdro_cli.rewards.registry import open_part, provenance
from gdro_cli.runtime.distributed import Engine, make_engine
from gdro_cli.runtime.interrupt import STOPPING, StopFlag
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.setup.imported import check_imported_prompts, open_imported
from gdro_cli.stages.setup.judge import open_judge
from gdro_cli.stages.setup.model import open_model
from gdro_cli.stages.setup.reward import open_reward
from gdro_cli.stages.setup.sources import check_sources

Split = Literal["train", "validation", "eval"]


class Session:
    """One command at work: its recipe, its folder, and what the recipe names, opened at the first use.

    Inside ``with session:`` the first Ctrl-C, SIGTERM or SIGHUP only sets ``stop``, which the stages check at their
    safe points.

    Args:
        recipe: what to do.
        workspace: folder of stores and runs (``--out``).
        reporter: where progress goes. Default: nowhere.
        parent: the session that this one is a part of, such as the ablation of a trial. Its processes do the work.
        model: the recipe's model, if the caller has already opened it.
        planning: only describe the work. The session then joins no other processes.
    """

    def __init__(
        self,
        recipe: Recipe,
        workspace: Path,
        reporter: Reporter | None = None,
        *,
        parent: Session | None = None,
        model: FlowModel | None = None,
        planning: bool = False,
    ) -> None:
        self.recipe, self.workspace = recipe, workspace
        self.reporter = reporter or Reporter(quiet=True)
        self.stop = StopFlag(on_request=lambda: self.reporter.say(STOPPING))
        self._parent, self._planning, self._tracked = parent, planning, False
        self._prompts: dict[Split, PromptSet] = {}
        self.remarks: list[tuple[str, str]] = []
        """What was said about the prompts, as (section of the recipe, text)."""
        if model is not None:
            self.model = model

    def __enter__(self) -> Self:
        self.stop.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if "engine" in self.__dict__:
                if error is None and (self._parent is None or self._tracked):
                    self.engine.close_trackers()
                if self._parent is None and (error is None or isinstance(error, Exception)):  # no message is under way
                    self.engine.end(failed=error is not None)
        finally:
            self.stop.__exit__(kind, error, trace)

    def part(self, recipe: Recipe, *, model: FlowModel | None = None) -> Session:
        """A session on another recipe in the same processes. What both recipes name is opened once.

        ``model``: the recipe's model, if only its identity is needed; a part that works opens its own.
        """
        part = Session(recipe, self.workspace, self.reporter, parent=self, model=model, planning=self._planning)
        if recipe.reward == self.recipe.reward:
            part.reward = self.reward
            if recipe.prompts == self.recipe.prompts:
                part._prompts = self._prompts
        if recipe.judge == self.recipe.judge:
            part.judge = self.judge
        return part

    def track(self) -> None:
        """Let the engine send metrics to the recipe's trackers. Call it before the first use of the engine."""
        self._tracked = bool(self.recipe.train.trackers)

    @cached_property
    def engine(self) -> Engine:
        """The processes of the job; see ``make_engine``."""
        if self._parent is not None and not self._tracked:
            return self._parent.engine
        trackers = self.recipe.train.trackers if self._tracked else ()
        return make_engine(trackers=trackers, out=self.workspace)

    @cached_property
    def model(self) -> FlowModel:
        """The recipe's model. Raises PrerequisiteError if it is missing."""
        return open_model(self.recipe, engine=None if self._planning else self.engine)

    @cached_property
    def reward(self) -> Reward:
        """The recipe's reward; its files are neither looked for nor loaded yet."""
        return open_reward(self.recipe)

    @cached_property
    def other_rewards(self) -> tuple[Reward, ...]:
        """The rewards that `gdro eval` reports beside the recipe's own.

        Raises:
            PrerequisiteError: one is a plug-in that cannot be used.
            UserError: a held-out prompt does not carry what one needs.
        """
        rewards = tuple(open_part(self.recipe.reward, name) for name in self.recipe.eval.rewards)
        for reward in rewards:
            for record in self.prompts("eval").records:
                try:
                    target = reward.read_prompt(record.prompt, target=record.target, metadata=record.metadata)
                    if target != record.target:
                        raise ValueError("its target is only in the text; give it as `target`")
                except ValueError as error:
                    raise UserError(
                        f"eval.rewards: {reward.name} cannot score {record.prompt!r} of prompts.eval: {error}"
                    ) from error
            for text in reward.check_prompts(self.prompts("eval").records):
                self._say("prompts.eval", text)
        return rewards

    @cached_property
    def reward_version(self) -> dict[str, Any]:
        """What the reward's scores depend on; it names tables and runs. Raises PrerequisiteError."""
        return provenance(self.reward)

    @cached_property
    def imported_store(self) -> GroupStore | None:
        """The imported data that the recipe trains on; None if its images are sampled. Raises PrerequisiteError."""
        name = self.recipe.prompts.train.imported
        if name is None:
            return None
        height, width = self.image_size
        return open_imported(self.workspace, name, self.model, height=height, width=width)

    @cached_property
    def judge(self) -> JudgeReward | None:
        """The recipe's judge; None if the recipe has none. Raises PrerequisiteError if its weights are missing."""
        return open_judge(self.recipe, edits=self.model.edits)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        sample = self.recipe.sample
        if sample.height is None or sample.width is None:
            return self.model.default_size
        return sample.height, sample.width

    def prompts(self, split: Split) -> PromptSet:
        """The recipe's training, validation or held-out prompts, their source images at the size of the job's images.

        Raises:
            UserError: the reward or the model cannot use them.
        """
        if split not in self._prompts:
            imported = self.imported_store if split == "train" else None
            if imported is None:
                prompts = load_prompts(getattr(self.recipe.prompts, split), reward=self.reward)
            else:
                if self.recipe.train.scores is None:
                    check_imported_prompts(imported, self.reward)
                prompts = PromptSet(imported.prompts, dropped_duplicates=0)
            self._remark(split, prompts)
            self._prompts[split] = prompts
        prompts = self._prompts[split]
        check_sources(prompts.records, self.model, where=f"prompts.{split}", key="image")
        return prompts.at_size(*self.image_size) if self.model.edits else prompts

    def _remark(self, split: Split, prompts: PromptSet) -> None:
        """Say what a user should know about prompts before images are made for them. Raises UserError."""
        given = split == "train" and self.recipe.train.scores is not None  # then the reward scores none of them
        for text in (*prompts.remarks, *(() if given else self.reward.check_prompts(prompts.records))):
            self._say(f"prompts.{split}", text)

    def _say(self, section: str, text: str) -> None:
        self.remarks.append((section, text))
        self.reporter.say(f"{section}: {text}")

    def require_store(self, stage: str) -> None:
        """Raise UserError if ``gdro sample`` or ``gdro score`` has nothing to do for this recipe."""
        if stage == "sample" and self.recipe.prompts.train.imported is not None:
            raise UserError(f"the recipe {self.recipe.name} has nothing to sample: its images are imported")
        if self.recipe.online_method is not None:
            raise UserError(
                f"the recipe {self.recipe.name} has nothing to {stage}: {self.recipe.method.name} makes and scores its"
                " images while it trains (gdro train)"
            )
