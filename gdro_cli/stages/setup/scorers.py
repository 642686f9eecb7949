"""Scoring processes and score tables of a session's reward and judge."""

from __future__ import annotations

from gdro_cli.data.scores import ScoreTable
from gdro_cli.data.store import GroupStore
from gdro_cli.rewards.base import Reward
from gdro_cli.rewards.judge.base import JudgeReward
from gdro_cli.rewards.pool import ScoringPool, usable_cores
from gdro_cli.stages.setup.session import Session


def open_reward_pool(session: Session, *, sharing: int | None = None) -> ScoringPool:
    """Processes that score.

    ``sharing``: how many processes on this machine, each with a pool, share its cores. Default: all of the job's.
    """
    reward, workers = session.reward, session.recipe.reward.workers
    if workers == "auto":
        workers = _own_cores(session, sharing) if reward.resources == "cores" else 1
    return ScoringPool(reward, workers=workers)


def open_reward_table(session: Session, store: GroupStore, *, command: str = "gdro score") -> ScoreTable:
    """Make or open the reward's table beside ``store``; error messages name ``command``, which makes the scores."""
    return ScoreTable.create_or_open(
        store, session.recipe.reward.kind, provenance=session.reward.version, command=command
    )


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
