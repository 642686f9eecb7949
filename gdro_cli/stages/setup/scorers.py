"""Scoring processes and score tables of a session's reward and judge."""

from __future__ import annotations

from gdro_cli.data.scores import ScoreTable
from gdro_cli.data.store import GroupStore
from gdro_cli.rewards.base import Reward
from gdro_cli.rewards.judge.base import JudgeReward
from gdro_cli.rewards.mix import MixReward
from gdro_cli.rewards.mixed_pool import MixedPool
from gdro_cli.rewards.pool import LARGEST_CHUNK, Pool, ScoringPool, usable_cores
from gdro_cli.rewards.registry import provenance
from gdro_cli.stages.setup.session import Session

SERVER_CHUNK = 64
"""Images that a process gets at a time which only asks a server: several requests at a time."""


def open_reward_pool(session: Session, *, sharing: int | None = None) -> Pool:
    """Processes that score; those of a mixture are its parts'.

    ``sharing``: how many processes on this machine, each with a pool, share its cores. Default: all of the job's.
    """
    reward = session.reward
    if isinstance(reward, MixReward):
        pools = {name: open_pool_of(session, part, sharing=sharing) for name, part in reward.parts.items()}
        return MixedPool(reward, pools)
    return open_pool_of(session, reward, sharing=sharing)


def open_pool_of(session: Session, reward: Reward, *, sharing: int | None = None) -> ScoringPool:
    """Processes of any reward, of the number that the recipe sets; see ``open_reward_pool``."""
    workers = session.recipe.reward.workers
    if workers == "auto":
        workers = _own_cores(session, sharing) if reward.resources == "cores" else 1
    chunk = SERVER_CHUNK if reward.resources == "server" else LARGEST_CHUNK
    return ScoringPool(reward, workers=workers, largest_chunk=chunk, timeout=session.recipe.reward.timeout)


def open_reward_table(session: Session, store: GroupStore, *, command: str = "gdro score") -> ScoreTable:
    """Make or open the reward's table beside ``store``; error messages name ``command``, which makes the scores."""
    return ScoreTable.create_or_open(
        store, session.recipe.reward.kind, provenance=session.reward_version, command=command
    )


def open_table_of(store: GroupStore, reward: Reward, *, command: str = "gdro score") -> ScoreTable:
    """Make or open the table of any reward, such as a part of a mixture; see ``open_reward_table``."""
    return ScoreTable.create_or_open(store, reward.name, provenance=provenance(reward), command=command)


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
