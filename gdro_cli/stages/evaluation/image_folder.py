"""Score a folder of images that any tool made, and write an evaluation's images for other tools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gdro_cli.core.scores import Interval
from gdro_cli.data.imagefolder import PromptImages, read_image_folder, refuse_used, write_image_folder
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreRow, ScoreTable, read_scores, write_scores
from gdro_cli.errors import Interrupted, StoreError
from gdro_cli.files import make_folder, new_folder, sha256_file, write_json
from gdro_cli.identity import digest
from gdro_cli.images import READING
from gdro_cli.rewards.pool import ScoringStopped
from gdro_cli.runtime.lock import folder_lock
from gdro_cli.stages.evaluation.measures import measured
from gdro_cli.stages.scoring.score_rows import score_rows
from gdro_cli.stages.setup.scorers import open_reward_pool
from gdro_cli.stages.setup.session import Session

PART = 8
"""Prompts scored between two files; an interruption costs at most one part."""
RESULTS_SCHEMA = 1
_SHOWN = 5
"""Names of files left out that are shown."""


@dataclass(frozen=True, slots=True)
class FolderResult:
    """The scores of an image folder."""

    measures: tuple[tuple[str, Interval], ...]
    failed: int
    """Images without a score."""
    results: Path

    @property
    def summary(self) -> dict[str, str]:
        """What the command line shows beside the table."""
        first = self.measures[0][1]
        rows = {"prompts": str(first.prompts), "images": str(first.images)}
        return rows | {"images without a score": str(self.failed), "results": str(self.results)}


def run(session: Session, *, folder: Path) -> FolderResult:
    """Score the images in ``folder`` (the official layout) with the recipe's reward; no model is needed.

    Raises:
        UserError: the folder or its metadata cannot be used.
        PrerequisiteError: the reward's weights are missing.
        StoreError: nothing, or nothing of one tag, could be scored.
        Interrupted: stopped by the user; finished parts are kept.
    """
    reward = session.reward
    entries = read_image_folder(folder, reward=reward)
    version = session.reward_version
    for remark in reward.check_prompts([entry.prompt for entry in entries]):
        session.reporter.say(remark)
    if left_out := [str(path.relative_to(folder)) for entry in entries for path in entry.left_out]:
        session.reporter.say(_not_scored(left_out))
    content = [[entry.prompt.id, [sha256_file(path) for path in entry.images]] for entry in entries]
    out = session.workspace / "folders" / f"{reward.name}-{digest([content, version, READING])}"
    make_folder(out)
    with session, folder_lock(out / "lock"):
        rows = score_parts(session, entries, out)
        return write_results(session, folder, entries, rows, out)


def _not_scored(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) + (" ..." if len(names) > _SHOWN else "")
    return f"not images of a format that is read, and left out: {len(names)} ({shown})"


def score_parts(session: Session, entries: tuple[PromptImages, ...], out: Path) -> list[ScoreRow]:
    """The score of every image, in order; parts that an earlier call has finished are read.

    Raises:
        Interrupted: the user asked to stop. Finished parts are kept, and also the current one if it is done within
            ``STOP_GRACE`` seconds.
    """
    parts = {out / f"{start:05d}.jsonl": entries[start : start + PART] for start in range(0, len(entries), PART)}
    missing = [path for path in parts if not path.exists()]
    stopped = f"stopped while scoring; finished scores are kept in {out}: run the command again to continue"
    if missing:
        total = sum(len(entry.images) for path in missing for entry in parts[path])
        with (
            open_reward_pool(session, sharing=1) as pool,
            session.reporter.track("scoring", total=total, unit="images") as progress,
        ):
            for path in missing:
                slots = [(entry.prompt, index) for entry in parts[path] for index in range(len(entry.images))]
                files, prompts = [file for entry in parts[path] for file in entry.images], [slot[0] for slot in slots]
                try:
                    scores = pool.score(files, prompts, on_scored=progress.advance, stop=lambda: session.stop.requested)
                except ScoringStopped as error:
                    raise Interrupted(stopped) from error
                write_scores(path, score_rows(slots, scores))
                session.stop.check(stopped)
    return [row for path, part in parts.items() for row in _read(path, part)]


def _read(path: Path, part: tuple[PromptImages, ...]) -> list[ScoreRow]:
    """The scores of one part. Raises StoreError if the file was changed or is about other images."""
    images = [(entry.prompt.id, index) for entry in part for index in range(len(entry.images))]
    return read_scores(path, images, remedy="delete it and run the command again")


def write_results(
    session: Session, folder: Path, entries: tuple[PromptImages, ...], rows: list[ScoreRow], out: Path
) -> FolderResult:
    """Write results.json with the intervals of what the reward reports."""
    reward, samples = session.reward, session.recipe.eval.bootstrap
    prompts = [entry.prompt for entry in entries]
    tags = {prompt.metadata.get("tag") for prompt in prompts}
    reasons = Counter(row.reason for row in rows if row.reason is not None)
    try:
        measures = tuple(
            (measure.name, measured(measure, prompts, rows).interval(samples=samples))
            for measure in reward.measures
            if measure.tag is None or measure.tag in tags
        )
    except StoreError as error:
        shown = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        raise StoreError(f"{error} (delete {out} first if the images stay the same): {shown}") from error
    failed = reasons.total()
    results = {
        "kind": "gdro folder results",
        "schema": RESULTS_SCHEMA,
        "folder": str(folder.resolve()),
        "reward": session.reward_version,
        "measures": {name: asdict(interval) for name, interval in measures},
        "failed": failed,
        "left_out": [str(path.relative_to(folder)) for entry in entries for path in entry.left_out],
        "bootstrap": samples,
        "prompts": [entry.prompt.to_json() for entry in entries],
        "images": [row.to_json() for row in rows],
    }
    path = out / "results.json"
    write_json(path, results)
    return FolderResult(measures, failed, path)


def write_images(folder: Path, tables: dict[str, ScoreTable], *, check: Callable[[], None] = lambda: None) -> None:
    """Write the images of each table's store in the official layout into a folder of its name; all or nothing.

    ``check`` is called before each prompt; an error that it raises ends the writing.

    Raises:
        UserError: ``folder`` exists and is not empty.
        StoreError: the disk refuses.
    """
    folder = folder.resolve()  # also for a name like `.`
    refuse_used(folder)
    with new_folder(folder) as partial:
        for name, table in tables.items():
            write_image_folder(partial / name, _checked(_entries(table), check))


def _checked(entries: list[PromptImages], check: Callable[[], None]) -> Iterator[PromptImages]:
    for entry in entries:
        check()
        yield entry


def _entries(table: ScoreTable) -> list[PromptImages]:
    images: dict[PromptRecord, list[Path]] = {}
    for number in range(len(table.store.shards)):
        for stored in table.store.images(number):
            images.setdefault(stored.prompt, []).append(stored.path)
    return [PromptImages(prompt, tuple(files)) for prompt, files in images.items()]
