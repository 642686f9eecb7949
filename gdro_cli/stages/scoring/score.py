"""Stage ``score``: give each stored image its reward. Scores are a side table; re-scoring never re-samples.

An image that cannot be scored is missing with a reason, never zero; too many of them stop the stage.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from gdro_cli.config.recipe import Recipe
from gdro_cli.data.scores import ScoreRow, ScoreSummary, ScoreTable
from gdro_cli.data.shard_times import add_time
from gdro_cli.errors import Interrupted, StoreError
from gdro_cli.rewards.pool import ScoringPool, ScoringStopped
from gdro_cli.runtime.distributed import Engine
from gdro_cli.runtime.interrupt import STOPPING, StopFlag
from gdro_cli.runtime.lock import folder_lock
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.sampling.sample import fill_store, own_part, training_store
from gdro_cli.stages.setup.rewards import open_pool, open_table
from gdro_cli.stages.setup.workspace import open_engine, open_model, refuse_online


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
        """What the command line shows."""
        mean = "none" if self.totals.mean is None else f"{self.totals.mean:.3f}"
        return {
            "scores": str(self.table.path),
            "images scored": f"{self.totals.scored} of {self.totals.images}",
            "mean reward": mean,
            f"mean of best of {self.table.store.images_per_prompt}": f"{self.best_of_group:.3f}",
            "shards made now": f"{self.shards_made} of {len(self.table.store.shards)}",
        }


def run(recipe: Recipe, workspace: Path, reporter: Reporter) -> ScoreResult:
    """Score the training store of ``recipe``; samples what is missing of it first.

    Raises:
        UserError: the recipe's method keeps no store.
        PrerequisiteError: the model or the reward engine is missing.
        StoreError: damaged files, or more failed images than ``reward.max_failed_share``.
        Interrupted: stopped by the user; finished shards are kept.
    """
    refuse_online(recipe, "score")
    with StopFlag(on_request=lambda: reporter.say(STOPPING)) as stop:
        engine = open_engine(recipe)
        model = open_model(recipe, engine=engine)
        store, plan = engine.from_main(lambda: training_store(recipe, workspace, model))
        table = engine.from_main(lambda: open_table(recipe, store))
        fill_store(model, store, plan, engine, recipe=recipe, reporter=reporter, stop=stop)
        pool = open_pool(recipe, sharing=engine.local_world)
        made = score_missing(table, pool, engine, reporter=reporter, stop=stop)
        with engine.together():
            refuse_failures(table, allowed=recipe.reward.max_failed_share, key="reward.max_failed_share")
        engine.end()
    return ScoreResult(table, table.summary(), best_of_group(table), made)


def score_missing(
    table: ScoreTable,
    pool: ScoringPool,
    engine: Engine,
    *,
    reporter: Reporter,
    stop: StopFlag,
    label: str = "scoring",
    refuse_empty: bool = False,
) -> int:
    """Score the shards that ``table`` lacks, all processes together, and return their number.

    Each process has a ``pool`` of its own, which starts only if it has shards to score. ``refuse_empty`` takes a shard
    without a single score for an outage: it is not kept, but asked again next time.

    Raises:
        Interrupted: a stop was asked for; finished shards are kept, and the one that is being scored if it is done
            within ``STOP_GRACE`` seconds.
        StoreError: another job is filling the table.
        EndedElsewhere: one of these was raised in another process.
    """
    missing = engine.from_main(table.missing_shards)
    if not missing:
        return 0
    store, own = table.store, engine.share(missing)
    todo = sum(len(store.shards[number]) for number in own) * store.images_per_prompt
    stopped = f"stopped while {label}; finished shards are kept in {table.path}: run the command again to go on"

    def score_shard(number: int) -> None:
        began = time.perf_counter()
        images = store.images(number)
        try:
            scores = pool.score(
                [image.path for image in images],
                [image.prompt for image in images],
                on_scored=progress.advance,
                stop=lambda: stop.requested,
            )
        except ScoringStopped as error:
            raise Interrupted(stopped) from error
        rows = [
            ScoreRow(image.prompt.id, image.index, score.value, score.reason, score.details)
            for image, score in zip(images, scores, strict=True)
        ]
        if refuse_empty and all(row.value is None for row in rows):
            raise StoreError(
                f"stopped while {label}: not one of {len(rows)} images got an answer ({rows[0].reason}); what was"
                f" finished is kept in {table.path}: mend the cause and run the command again"
            )
        table.write_shard(number, rows)
        add_time(table.path, number, time.perf_counter() - began, processes=engine.world)
        stop.check(stopped)

    with (
        engine.held_by_main(folder_lock(table.path / "lock")),
        pool if own else nullcontext(),
        reporter.track(label + own_part(engine), total=todo, unit="images") as progress,
    ):
        engine.take_turns(missing, score_shard)
    return len(missing)


def refuse_failures(table: ScoreTable, *, allowed: float, key: str) -> None:
    """Check the share of images without a score.

    Raises:
        StoreError: it is above ``allowed``, the value of the recipe key ``key``.
    """
    totals = table.summary()
    if totals.missing_share > allowed:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in totals.reasons[:3])
        raise StoreError(
            f"{totals.images - totals.scored} of {totals.images} images in {table.path} could not be scored, more than"
            f" {key} ({allowed:g}) allows ({reasons}): mend the cause, delete that folder and run the command again"
        )


def best_of_group(table: ScoreTable) -> float:
    """Mean over the groups of their highest reward (nan if none is scored)."""
    best: dict[str, float] = {}
    for row in table.rows():
        if row.value is not None:
            best[row.prompt_id] = max(row.value, best.get(row.prompt_id, row.value))
    return sum(best.values()) / len(best) if best else float("nan")
