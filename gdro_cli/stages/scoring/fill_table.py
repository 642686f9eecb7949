"""Fill a score table: a pool of processes scores the stored images that it lacks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial

from gdro_cli.data.scores import ScoreTable
from gdro_cli.data.shard_times import add_time, total_time
from gdro_cli.errors import Interrupted, StoreError
from gdro_cli.rewards.base import Score
from gdro_cli.rewards.mix import MixReward
from gdro_cli.rewards.pool import Pool, ScoringStopped
from gdro_cli.runtime.lock import folder_lock
from gdro_cli.stages.sampling.fill_store import own_part
from gdro_cli.stages.scoring.score_rows import score_rows
from gdro_cli.stages.setup.scorers import open_pool_of, open_table_of
from gdro_cli.stages.setup.session import Session


def score_missing(
    session: Session, table: ScoreTable, pool: Pool, *, label: str = "scoring", refuse_empty: bool = False
) -> int:
    """Score the shards that ``table`` lacks, all processes together, and return their number.

    Each process has its own ``pool``, which starts only if the process has shards to score. With ``refuse_empty`` a
    shard without a single score counts as an outage: it is not kept, and the next start scores it again.

    Raises:
        Interrupted: a stop was requested; finished shards are kept, and also the present one if it is done within
            ``STOP_GRACE`` seconds.
        StoreError: another job is filling the table, or an outage.
        EndedElsewhere: another process raised one of these.
    """
    engine, stop = session.engine, session.stop
    missing = engine.from_main(table.missing_shards)
    if not missing:
        return 0
    store, own = table.store, engine.share(missing)
    total = sum(len(store.shards[number]) for number in own) * store.images_per_prompt
    stopped = f"stopped while {label}; finished shards are kept in {table.path}: run the command again to continue"

    def score_shard(number: int) -> None:
        start = time.perf_counter()
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
        rows = score_rows([(image.prompt, image.index) for image in images], scores)
        if refuse_empty and all(row.value is None for row in rows):
            raise StoreError(
                f"stopped while {label}: none of {len(rows)} images got an answer ({rows[0].reason}); finished shards"
                f" are kept in {table.path}: fix the cause and run the command again"
            )
        table.write_shard(number, rows)
        add_time(table.path, number, time.perf_counter() - start, processes=engine.world)
        stop.check(stopped)

    with (
        engine.held_by_main(folder_lock(table.path / "lock")),
        pool if own else nullcontext(),
        session.reporter.track(label + own_part(engine), total=total, unit="images") as progress,
    ):
        engine.take_turns(missing, score_shard)
    return len(missing)


def score_rewards(session: Session, table: ScoreTable, *, label: str = "scoring") -> int:
    """Fill the table of the recipe's reward; for a mixture, first those of its parts, which other weights share.

    Returns the number of shards made. Raises what ``score_missing`` raises.
    """
    engine, reward = session.engine, session.reward
    if not isinstance(reward, MixReward):
        return score_missing(session, table, open_pool_of(session, reward), label=label)
    missing = engine.from_main(table.missing_shards)
    if not missing:
        return 0
    tables: dict[str, ScoreTable] = {}
    for part in reward.parts.values():
        tables[part.name] = engine.from_main(partial(open_table_of, table.store, part, command=table.command))
        score_missing(session, tables[part.name], open_pool_of(session, part), label=f"{label}, {part.name}")
    with engine.together():
        if engine.is_main:
            for number in missing:
                _combine(reward, table, tables, number)
    return len(missing)


def _combine(reward: MixReward, table: ScoreTable, parts: Mapping[str, ScoreTable], number: int) -> None:
    """Make one shard of a mixture's table from those of its parts; its time is their mean time per shard."""
    scores = {
        name: [Score(row.value, row.reason, row.details) for row in part.read_shard(number)]
        for name, part in parts.items()
    }
    images = table.store.images(number)
    table.write_shard(number, score_rows([(image.prompt, image.index) for image in images], reward.combined(scores)))
    shards = len(table.store.shards)
    times = [total_time(part.path, shards=shards) for part in parts.values()]
    known = [seconds for seconds in times if seconds is not None]
    if len(known) == len(times):
        add_time(table.path, number, sum(known) / shards)


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
            f" {key} ({allowed:g}) allows ({reasons}): fix the cause, delete that folder and run the command again"
        )
