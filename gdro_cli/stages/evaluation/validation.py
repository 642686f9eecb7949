"""Evaluation points during training: reward, quality and corrected score on the validation prompts.

Measured with the weights that would be exported. Settings may be chosen by these numbers; the held-out prompts of
``gdro eval`` stay unseen until then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from gdro_cli.config.base import digest
from gdro_cli.config.recipe import Recipe
from gdro_cli.core.verdict import Verdict
from gdro_cli.data.prompts import PromptSet
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreRow
from gdro_cli.errors import Interrupted, StoreError
from gdro_cli.files import json_bytes, parse_json, sha256, write_bytes, write_json
from gdro_cli.models.base import Conditioning, FlowModel
from gdro_cli.rewards.pool import ScoringPool, ScoringStopped
from gdro_cli.runtime.distributed import Engine
from gdro_cli.runtime.interrupt import StopFlag
from gdro_cli.stages.evaluation.quality import GROUP_SIGNALS, Rated, joined, pair_verdict, quality_measures, rate
from gdro_cli.stages.reporting.image_sheet import draw_sheet
from gdro_cli.stages.sampling.sample import decode_images, sample_images
from gdro_cli.stages.scoring.drawn import score_drawn, why_none
from gdro_cli.stages.setup.judging import open_judge, open_judge_pool
from gdro_cli.stages.setup.rewards import Measure, measures, open_pool, open_reward, trained_detail
from gdro_cli.stages.setup.workspace import SamplingPlan, evaluation_plan, open_prompts

FOLDER = "validation"
_BASE = "base.json"


class PointGivenUp(Interrupted):
    """A stop was asked for while the pictures of an evaluation point were scored, and the scores did not come soon.

    All processes raise it.
    """


@dataclass(frozen=True, slots=True)
class Protocol:
    """Digests of what evaluation points must share."""

    points: str
    """To be points of one curve."""
    measures: str
    """To be compared by everything but the reward that is trained on, which may be another."""
    base: str
    """For the untrained model to have the same rows and pictures."""


def validation_protocol(recipe: Recipe, model: FlowModel, prompts: PromptSet) -> Protocol:
    """What the evaluation points of a recipe depend on, beside the adapter."""
    plan = evaluation_plan(recipe, model, images_per_prompt=recipe.eval.validation_images_per_prompt)
    judge = open_judge(recipe)
    versions = [dict(open_reward(recipe).version), None if judge is None else dict(judge.version)]
    drawn = [*astuple(plan), prompts.digest]
    who = {key: value for key, value in model.identity.items() if key != "path"}
    text = [who, str(model.dtype), recipe.model.max_sequence_length]
    return Protocol(
        points=digest([*drawn, recipe.eval.weights, *versions, {"trained on": trained_detail(recipe)}]),
        measures=digest([*drawn, recipe.eval.weights, *versions, *text]),
        base=digest([*drawn, *versions, *text, recipe.eval.grid_prompts]),
    )


@dataclass(slots=True)
class Validation:
    """Samples, scores and judges the validation prompts; they are encoded once and the scoring processes stay up.

    The job's processes share the sampling; the main one scores and judges, and only it knows the results.
    """

    recipe: Recipe
    model: FlowModel
    engine: Engine
    prompts: PromptSet
    plan: SamplingPlan
    conditioning: list[Conditioning]
    folder: Path
    """For the base model's rows and the sheets of pictures."""
    rewards: ScoringPool | None
    """None in the other processes."""
    judges: ScoringPool | None
    """None where there is no judge, and in the other processes."""
    protocol: str
    """Digest of what two points must share to be compared."""
    shared: Path
    """Folder of the base model's rows that all runs of the workspace share."""
    stop: StopFlag
    """Heard while pictures are scored and judged; a point that is given up then is measured by the next start."""
    base: Rated | None = field(default=None)
    """The untrained model's pictures, what verdicts compare with."""
    base_seconds: float = 0.0
    """Wall time of getting them."""
    asked: bool = False
    """Whether ``base`` has been looked for."""

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        model: FlowModel,
        engine: Engine,
        run: Path,
        stack: ExitStack,
        *,
        stop: StopFlag,
        rewards: ScoringPool | None = None,
    ) -> Validation:
        """Encode the prompts and start the scoring processes, which end with ``stack``; ``rewards`` run already."""
        prompts = open_prompts(recipe, recipe.prompts.validation)
        plan = evaluation_plan(recipe, model, images_per_prompt=recipe.eval.validation_images_per_prompt)
        conditioning = model.encode([prompt.prompt for prompt in prompts.records])
        model.release_encoders()
        protocol = engine.from_main(lambda: validation_protocol(recipe, model, prompts))
        judge = open_judge(recipe) if engine.is_main else None
        if rewards is None and engine.is_main:
            rewards = stack.enter_context(open_pool(recipe))
        judges = None if judge is None else stack.enter_context(open_judge_pool(recipe, judge))
        return cls(
            recipe,
            model,
            engine,
            prompts,
            plan,
            conditioning,
            run / FOLDER,
            rewards,
            judges,
            protocol.points,
            run.parent.parent / FOLDER / protocol.base,
            stop,
        )

    def know_base(self, without_adapter: Callable[[], AbstractContextManager[object]]) -> None:
        """Read the base model's rows of an earlier start or another run, or measure them in ``without_adapter()``.

        Once; all processes together.
        """
        if self.asked:
            return
        began = time.perf_counter()
        self.asked = True
        if not self.engine.from_main(self._recall_base):
            with without_adapter():
                self.base = self.look(step=0)
            with self.engine.together():
                if self.base is not None:
                    self._keep_base(self.base)
        self.base_seconds = time.perf_counter() - began

    def _recall_base(self) -> bool:
        """Read the base model's rows of an earlier start or another run, if there are any."""
        self.base = _read_base(self.folder / _BASE, self.protocol, self._asked)
        if self.base is not None:
            return True
        self.base = _read_base(self.shared / _BASE, self.shared.name, self._asked)
        if self.base is None:
            return False
        _copy(self._sheet(0, self.shared), self._sheet(0))
        _write_base(self.folder / _BASE, self.protocol, self.base)
        return True

    def _keep_base(self, base: Rated) -> None:
        """Write the base model's rows for later starts and other runs, if they are complete."""
        if base.failed or base.unjudged:
            return  # good enough for this start; measured again at the next
        _copy(self._sheet(0), self._sheet(0, self.shared))
        _write_base(self.shared / _BASE, self.shared.name, base)
        _write_base(self.folder / _BASE, self.protocol, base)

    def measure(self, step: int) -> tuple[dict[str, float | int | str], Verdict | None] | None:
        """The row of an evaluation point for the adapter as it is now, and the verdict on it.

        All processes together; None in all but the main one.

        Raises:
            StoreError: no image could be scored.
            PointGivenUp: a stop was asked for, and the scores were not there soon after.
            EndedElsewhere: an error in another process.
        """
        began = time.perf_counter()
        known = self.engine.from_main(lambda: self._base_serves(step))
        rated = self.base if known else self.look(step=step)
        with self.engine.together():
            return None if rated is None else self._row(rated, known, began)

    def _base_serves(self, step: int) -> bool:
        """Whether the base model's pictures are the adapter's: at step 0 it has not learnt and changes nothing."""
        drawn = self._sheet(0).is_file() or not self.recipe.eval.grid_prompts
        return step == 0 and drawn and self.base is not None

    def _row(self, rated: Rated, known: bool, began: float) -> tuple[dict[str, float | int | str], Verdict | None]:
        samples, headline = self.recipe.eval.bootstrap, measures(self.recipe)[0]
        interval = rated.values(Measure("reward", trained_detail(self.recipe))).interval(samples=samples)
        row: dict[str, float | int | str] = {
            "protocol": self.protocol,
            "reward": interval.mean,
            "low": interval.low,
            "high": interval.high,
        }
        for measure in (headline, *quality_measures(self.recipe)):
            if rated.has(measure):
                row[measure.name] = rated.values(measure).interval(samples=samples).mean
        found = None if self.base is None else pair_verdict(self.recipe, self.base, rated)
        row |= {} if found is None else {"verdict": found.level}
        row |= {"prompts": interval.prompts, "images": interval.images, "failed": rated.failed}
        row |= {"unjudged": rated.unjudged} if rated.judged else {}
        seconds = time.perf_counter() - began + (self.base_seconds if known else 0.0)
        return row | {"seconds": seconds}, found

    def look(self, *, step: int) -> Rated | None:
        """Sample, all processes together, and score and judge in the main one; None in the others."""
        seeds = [
            [self.plan.image_seed(prompt.id, index) for index in range(self.plan.images_per_prompt)]
            for prompt in self.prompts.records
        ]
        size, engine = self.recipe.sample.batch_size, self.engine
        latents = sample_images(self.model, self.conditioning, seeds, self.plan, batch_size=size, split=engine)
        rated, given_up = None, False
        with engine.together():
            try:
                rated = self._rated(latents, step) if engine.is_main else None
            except ScoringStopped:
                given_up = True
        if engine.any(given_up):
            raise PointGivenUp(
                f"stopped while the pictures of step {step} were scored; run the same command again to go on"
            )
        return rated

    def _rated(self, latents: Tensor, step: int) -> Rated:
        """Score and judge the images, and draw the sheet of pictures of a step."""
        if self.rewards is None:
            raise RuntimeError("only the main process scores")
        size = self.recipe.sample.batch_size
        pictures = decode_images(self.model, latents, self.plan, batch_size=size)
        count = self.plan.images_per_prompt
        asked = self._asked
        texts = [prompt for prompt, _ in asked]

        def rows(pool: ScoringPool) -> list[ScoreRow]:
            found = score_drawn(pool, pictures, texts, stop=self.stop)
            return [
                ScoreRow(prompt.id, index, score.value, score.reason, score.details)
                for (prompt, index), score in zip(asked, found, strict=True)
            ]

        scored = rows(self.rewards)
        if all(row.value is None for row in scored):
            why = why_none(row.reason for row in scored)
            raise StoreError(f"none of the {len(scored)} validation images could be scored {why}")
        judged: list[ScoreRow] | list[None] = [None] * len(scored) if self.judges is None else rows(self.judges)
        full = [joined(self.recipe, row, judgement) for row, judgement in zip(scored, judged, strict=True)]
        if shown := self.prompts.records[: self.recipe.eval.grid_prompts]:
            sheet = {f"step {step}": [(pictures[i * count], full[i * count]) for i in range(len(shown))]}
            draw_sheet(self._sheet(step), [prompt.prompt for prompt in shown], sheet)
        return rate(self.recipe, self.prompts.records, full, pictures, judged=self.judges is not None)

    @property
    def _asked(self) -> list[tuple[PromptRecord, int]]:
        """The prompt of each picture, and its place among the prompt's."""
        count = self.plan.images_per_prompt
        return [(prompt, index) for prompt in self.prompts.records for index in range(count)]

    def _sheet(self, step: int, folder: Path | None = None) -> Path:
        return (folder or self.folder) / f"step-{step:06d}.png"


def _copy(source: Path, target: Path) -> None:
    """Copy a sheet of pictures, if there is one."""
    if source.is_file():
        write_bytes(target, source.read_bytes())


def _write_base(path: Path, protocol: str, base: Rated) -> None:
    rows = [row.to_json() for row in base.rows]
    content = {"protocol": protocol, "judged": base.judged, "groups": base.groups, "rows": rows}
    write_json(path, content | {"sha256": sha256(json_bytes(content))})


def _read_base(path: Path, protocol: str, asked: Sequence[tuple[PromptRecord, int]]) -> Rated | None:
    """The rows of a file, for these prompts and places; None where it is missing, another's, or not as it was written.

    Whatever is wrong with it, the base model is then measured again.
    """
    try:
        held: dict[str, Any] = parse_json(path.read_bytes())
        said = held.pop("sha256")
        if held["protocol"] != protocol or sha256(json_bytes(held)) != said:
            return None
        rows = tuple(ScoreRow.from_json(row) for row in held["rows"])
        pairs = [(row.prompt_id, row.index) for row in rows]
        if pairs != [(prompt.id, index) for prompt, index in asked] or not isinstance(held["judged"], bool):
            return None
        prompts = tuple(dict.fromkeys(prompt for prompt, _ in asked))
        return Rated(prompts, rows, _groups(held["groups"], prompts), held["judged"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _groups(held: Any, prompts: Sequence[PromptRecord]) -> dict[str, dict[str, float | None]]:
    """The group signals of each prompt. Raises ValueError for anything else."""
    if not isinstance(held, dict) or held.keys() != {prompt.id for prompt in prompts}:
        raise ValueError("there are signals of other prompts")
    for signals in held.values():
        if not isinstance(signals, dict) or signals.keys() != set(GROUP_SIGNALS):
            raise ValueError("there are other signals")
        if not all(value is None or type(value) in (int, float) for value in signals.values()):
            raise ValueError("a signal is a number")
    return held
