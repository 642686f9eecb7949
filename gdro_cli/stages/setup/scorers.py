"""Scoring processes and score tables of a session's reward and judge."""

from __future__ import annotations

from copy import deepcopy

from gdro_cli.config.sections import RewardSection
from gdro_cli.data.imported_scores import imported_scores
from gdro_cli.data.scores import ScoreTable
from gdro_cli.data.store import GroupStore
from gdro_cli.rewards.base import Reward
from gdro_cli.rewards.judge.base import JudgeReward
from gdro_cli.rewards.mix import MixReward
from gdro_cli.rewards.mixed_pool import MixedPool
from gdro_cli.rewards.pool import Pool, ScoringPool, usable_cores
from gdro_cli.rewards.registry import provenance
from gdro_cli.stages.setup.session import Session


def open_reward_pool(session: Session, *, sharing: int | None = None) -> Pool:
    """Processes that score; those of a mixture are its parts'.

    ``sharing``: how many processes on this machine, each with a pool, share its cores. Default: all of the job's.
    """
    return make_reward_pool(session.reward, session.recipe.reward, cores=_own_cores(session, sharing))


def open_pool_of(session: Session, reward: Reward, *, sharing: int | None = None) -> ScoringPool:
    """Processes of any reward but a mixture, as the recipe sets them; see ``open_reward_pool``."""
    return _make_pool(reward, session.recipe.reward, cores=_own_cores(session, sharing))


def make_reward_pool(reward: Reward, section: RewardSection, *, cores: int) -> Pool:
    """Processes that score with a reward, as its section of a recipe sets them; those of a mixture are its parts'.

    Args:
        reward: the reward.
        section: has the number of workers and the time limit.
        cores: CPU cores to use.
    """
    if isinstance(reward, MixReward):
        return MixedPool(reward, {name: _make_pool(part, section, cores=cores) for name, part in reward.parts.items()})
    return _make_pool(reward, section, cores=cores)


def _make_pool(reward: Reward, section: RewardSection, *, cores: int) -> ScoringPool:
    if reward.resources == "server":  # it divides the images into requests, and bounds the time of each
        return ScoringPool(reward, workers=1, largest_chunk=None)
    workers = 1 if reward.resources == "device" else cores if section.workers == "auto" else section.workers
    return ScoringPool(reward, workers=workers, timeout=section.timeout)


def open_reward_table(session: Session, store: GroupStore, *, command: str = "gdro score") -> ScoreTable:
    """Make or open the reward's table beside ``store``; error messages name ``command``, which makes the scores."""
    return ScoreTable.create_or_open(
        store, session.recipe.reward.kind, provenance=session.reward_version, command=command
    )


def open_training_scores(session: Session, store: GroupStore) -> ScoreTable:
    """The scores that the recipe trains on: those imported for ``train.scores``, else the reward's table.

    Raises PrerequisiteError if no scores were imported by that name.
    """
    name = session.recipe.train.scores
    return open_reward_table(session, store) if name is None else imported_scores(store, name)


def open_table_of(store: GroupStore, reward: Reward, *, command: str = "gdro score") -> ScoreTable:
    """Make or open the table of any reward, such as a part of a mixture; see ``open_reward_table``."""
    return ScoreTable.create_or_open(store, reward.name, provenance=provenance(reward), command=command)


def check_servers(scorer: Reward | JudgeReward, table: ScoreTable | None = None) -> None:
    """Ask the servers that score or judge whether they answer, before work that would be lost without them.

    Rewards of other packages are left to their scoring processes, which are the only ones that load them.

    Args:
        scorer: a reward, a mixture or a judge.
        table: what the servers are to fill; if it is complete, nothing is asked.

    Raises:
        PrerequisiteError: one cannot be reached, refuses the key, or lacks the model.
        StoreError: the table is damaged.
    """
    parts = scorer.parts.values() if isinstance(scorer, MixReward) else (scorer,)
    servers = [one for one in parts if one.resources == "server" and type(one).__module__.startswith("gdro_cli.")]
    if not servers or (table is not None and table.is_complete):
        return
    for one in servers:
        deepcopy(one).load()  # the original remains unchecked: its process asks again


def leave_device(session: Session, scorer: Reward | JudgeReward) -> None:
    """Free the model's memory on the GPU if the scorer needs a GPU; the model returns at its next use."""
    if scorer.resources == "device":
        session.model.leave_device(whole=session.recipe.model.sharding == "none")


def open_judge_pool(session: Session, *, sharing: int | None = None) -> ScoringPool | None:
    """Processes that judge, or None without a judge.

    An endpoint gets several requests at a time from one process.
    """
    judge = session.judge
    if judge is None:
        return None
    if judge.resources == "cores":
        return ScoringPool(judge, workers=_own_cores(session, sharing))
    return ScoringPool(judge, workers=1, largest_chunk=4 * session.recipe.judge.concurrency)


def open_judge_table(session: Session, store: GroupStore) -> ScoreTable | None:
    """Make or open the judge's table beside ``store``; None without a judge."""
    judge = session.judge
    if judge is None:
        return None
    return ScoreTable.create_or_open(store, "judge", provenance=judge.version, command="gdro eval")


def _own_cores(session: Session, sharing: int | None) -> int:
    return max(1, usable_cores() // (session.engine.local_world if sharing is None else sharing))
