"""Fill a score table: a pool of processes scores the stored images that it lacks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial

from gdro_cli.data.scores import ScoreTable
from gdro_cli.data.shard_times import add_time, total_time
from gdro_cli.errors import Interrupted, PrerequisiteError, StoreError
from gdro_cli.rewards.base import Reward, Score
from gdro_cli.rewards.mix import MixReward
from gdro_cli.rewards.pool import Pool, ScoringStopped
from gdro_cli.rewards.registry import provenance
from gdro_cli.runtime.lock import folder_lock
from gdro_cli.stages.sampling.fill_store import own_part
from gdro_cli.stages.scoring.score_rows import score_rows
from gdro_cli.stages.setup.scorers import leave_device, open_pool_of, open_table_of
from gdro_cli.stages.setup.session import Session


def score_missing(
    session: Session,
    table: ScoreTable,
    pool: Pool,
    *,
    label: str = "scoring",
    refuse_empty: bool = False,
    allowed: float = 1.0,
) -> int:
    """Score what ``shards_to_score`` names, all processes together, and return the number of shards.

    Each process has its own ``pool``, which starts only if the process has shards to score. With ``refuse_empty`` a
    shard without a single score counts as an outage: it is not kept, and the next start scores it again.

    Raises:
        Interrupted: a stop was requested; finished shards are kept, and also the present one if it is done within
            ``STOP_GRACE`` seconds.
        StoreError: another job is filling the table, or an outage.
        EndedElsewhere: another process raised one of these.
    """
    engine, stop = session.engine, session.stop
    missing = engine.from_main(lambda: shards_to_score(table, allowed=allowed))
    if not missing:
        return 0
    store, own = table.store, engine.share(missing)
    total = sum(store.images_in(number) for number in own)
    stopped = f"stopped while {label}; finished shards are kept in {table.path}: run the command again to continue"

    def score_shard(number: int) -> None:
        start = time.perf_counter()
        kept = {(row.prompt_id, row.index): row for row in table.scored_rows(number)}
        images = [image for image in store.images(number) if (image.prompt.id, image.index) not in kept]
        progress.advance(len(kept))
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
        if refuse_empty and not kept and all(row.value is None for row in rows):
            raise StoreError(
                f"stopped while {label}: none of {len(rows)} images got an answer ({rows[0].reason}); finished shards"
                f" are kept in {table.path}: fix the cause and run the command again"
            )
        made = kept | {(row.prompt_id, row.index): row for row in rows}
        table.write_shard(number, [made[image.prompt.id, image.index] for image in store.images(number)])
        add_time(table.path, number, time.perf_counter() - start, processes=engine.world)
        stop.check(stopped)

    with (
        engine.held_by_main(folder_lock(table.path / "lock")),
        pool if own else nullcontext(),
        session.reporter.track(label + own_part(engine), total=total, unit="images") as progress,
    ):
        engine.take_turns(missing, score_shard)
    return len(missing)


def score_with_reward(session: Session, table: ScoreTable, *, label: str) -> int:
    """Fill the reward's table, all processes together, and return the number of shards scored.

    For a mixture, the tables of its parts are filled first; mixtures with other weights share them.

    Raises what ``score_missing`` and ``refuse_failures`` raise.
    """
    engine, reward, allowed = session.engine, session.reward, session.recipe.reward.max_failed_share
    if isinstance(reward, MixReward):
        missing = engine.from_main(lambda: shards_to_score(table, allowed=allowed))
        made = len(missing)
        if missing:
            _mix(session, reward, table, missing, label=label)
    else:
        made = score_by(session, reward, table, label=label)
    with engine.together():
        refuse_failures(table, allowed=allowed, key="reward.max_failed_share")
    return made


def score_by(session: Session, reward: Reward, table: ScoreTable, *, label: str, allowed: float | None = None) -> int:
    """Fill the table of any reward but a mixture; see ``score_missing``. A reward that needs the GPU gets it.

    ``allowed``: as in ``shards_to_score``. Default: the recipe's.

    Raises:
        PrerequisiteError: the server of this process has another version than the table's.
    """
    leave_device(session, reward)
    server = reward.resources == "server"
    with session.engine.together():  # each process has asked the server itself
        if server and provenance(reward) != table.provenance:
            raise PrerequisiteError(
                f"the reward {reward.name} has another version than when {table.path} was opened: run the command again"
            )
    allowed = session.recipe.reward.max_failed_share if allowed is None else allowed
    return score_missing(
        session, table, open_pool_of(session, reward), label=label, refuse_empty=server, allowed=allowed
    )


def _mix(session: Session, reward: MixReward, table: ScoreTable, shards: Sequence[int], *, label: str) -> None:
    """Make these shards of a mixture's table. After a refusal, all failures of its parts are retried."""
    engine, limit = session.engine, session.recipe.reward.max_failed_share
    allowed = limit if engine.from_main(table.missing_shards) else 0.0
    parts: dict[str, ScoreTable] = {}
    for name, part in reward.parts.items():
        parts[name] = engine.from_main(partial(open_table_of, table.store, part, command=table.command))
        score_by(session, part, parts[name], label=f"{label}, {name}", allowed=allowed)
        with engine.together():
            _refuse(parts[name], allowed=limit, key="reward.max_failed_share")
    with engine.held_by_main(folder_lock(table.path / "lock")), engine.together():
        if engine.is_main:
            times = [total_time(part.path, shards=len(table.store.shards)) for part in parts.values()]
            known = [seconds for seconds in times if seconds is not None]
            for number in shards:
                session.stop.check(f"stopped while {label}; run the command again to continue")
                _combine(reward, table, parts, number)
                if len(known) == len(times):
                    add_time(table.path, number, sum(known) / len(table.store.shards))


def _combine(reward: MixReward, table: ScoreTable, parts: Mapping[str, ScoreTable], number: int) -> None:
    """Make one shard of a mixture's table from those of its parts."""
    scores = {
        name: [Score(row.value, row.reason, row.details) for row in part.read_shard(number)]
        for name, part in parts.items()
    }
    images = table.store.images(number)
    table.write_shard(number, score_rows([(image.prompt, image.index) for image in images], reward.combined(scores)))


def shards_to_score(table: ScoreTable, *, allowed: float) -> list[int]:
    """The numbers of the shards without scores; of a table that no training can have used also those with failures.

    Such a table is not complete, or lacks more than the share ``allowed``, so that ``refuse_failures`` has refused it.
    Its failed images are scored once more: a server may be back, or a cause removed.
    """
    missing = table.missing_shards()
    if not table.accepted and (missing or table.summary().missing_share > allowed):
        return sorted({*missing, *table.shards_with_failures()})
    return missing


def refuse_failures(table: ScoreTable, *, allowed: float, key: str) -> None:
    """Check the share of images without a score; the scores of a table that passes are not made again.

    Raises:
        StoreError: it is above ``allowed``, the value of the recipe key ``key``.
    """
    _refuse(table, allowed=allowed, key=key)
    table.accept()


def _refuse(table: ScoreTable, *, allowed: float, key: str) -> None:
    totals = table.summary()
    if totals.missing_share > allowed:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in totals.reasons[:3])
        remedy = "fix the cause and run the command again, which scores them once more"
        if table.accepted:
            remedy = f"raise {key}, or delete that folder, which earlier commands have used, to score them once more"
        raise StoreError(
            f"{totals.images - totals.scored} of {totals.images} images in {table.path} could not be scored, more than"
            f" {key} ({allowed:g}) allows ({reasons}): {remedy}"
        )
