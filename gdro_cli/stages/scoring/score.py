"""Stage ``score``: give each stored image its reward. Scores are a table of their own; scoring again samples nothing.

An image that cannot be scored is missing with a reason, never zero; too many missing images stop the stage.
"""

from __future__ import annotations

from dataclasses import dataclass

from gdro_cli.data.scores import ScoreSummary, ScoreTable
from gdro_cli.data.store import GroupStore
from gdro_cli.stages.sampling.fill_store import fill_store
from gdro_cli.stages.scoring.fill_table import score_with_reward
from gdro_cli.stages.setup.scorers import check_servers, open_training_scores
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import open_training_store, training_plan


@dataclass(frozen=True, slots=True)
class ScoreResult:
    """A complete score table and how much of it this call made."""

    table: ScoreTable
    totals: ScoreSummary
    best_of_group: float
    """Mean over groups of the highest reward."""
    shards_made: int

    @property
    def summary(self) -> dict[str, str]:
        """What the command line prints."""
        counts = self.table.store.sizes.values()
        sizes = map(str, sorted({min(counts), max(counts)}))
        mean = "none" if self.totals.mean is None else f"{self.totals.mean:.3f}"
        return {
            "scores": str(self.table.path),
            "images scored": f"{self.totals.scored} of {self.totals.images}",
            "mean reward": mean,
            f"mean of best of {' to '.join(sizes)}": f"{self.best_of_group:.3f}",
            "shards made now": f"{self.shards_made} of {len(self.table.store.shards)}",
        }


def run(session: Session) -> ScoreResult:
    """Score the recipe's training store, after sampling what is missing.

    Imported scores stay as they are.

    Raises:
        UserError: the recipe's method has no store.
        PrerequisiteError: the model or the reward engine is missing.
        StoreError: files are damaged, or more images failed than ``reward.max_failed_share``.
        Interrupted: stopped by the user; finished shards are kept.
    """
    session.require_store("score")
    with session:
        table, made = make_scored_store(session)
        return ScoreResult(table, table.summary(), best_of_group(table), made)


def make_scored_store(session: Session) -> tuple[ScoreTable, int]:
    """Sample and score what is missing of the training store, all processes together.

    Returns:
        The complete score table, and how many of its shards this call made.

    Raises:
        PrerequisiteError: the recipe names imported data or scores that are not there, or a server does not answer.
        StoreError: too many images could not be scored, or another job is at work on them.
        Interrupted: stopped by the user; finished shards are kept.
        EndedElsewhere: another process raised one of these.
    """
    store = open_training_store(session)

    def open_table() -> ScoreTable:
        table = open_training_scores(session, store)
        if session.recipe.train.scores is None:
            check_servers(session.reward, table)
        return table

    table = session.engine.from_main(open_table)
    fill_training_store(session, store)
    imported = session.recipe.train.scores is not None
    return table, 0 if imported else score_with_reward(session, table, label="scoring")


def fill_training_store(session: Session, store: GroupStore) -> None:
    """Sample the shards that the training store lacks; imported data is complete. Raises what ``fill_store`` raises."""
    if session.imported_store is None:
        fill_store(session, store, training_plan(session), label="sampling")


def best_of_group(table: ScoreTable) -> float:
    """Mean over the groups of their highest reward (nan if no image has a score)."""
    best: dict[str, float] = {}
    for row in table.rows():
        if row.value is not None:
            best[row.prompt_id] = max(row.value, best.get(row.prompt_id, row.value))
    return sum(best.values()) / len(best) if best else float("nan")
