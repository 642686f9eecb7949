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

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from gdro_cli.core.measures import Measure
from gdro_cli.core.verdict import Verdict
from gdro_cli.data.prompts import PromptSet
from gdro_cli.data.scores import ScoreRow
from gdro_cli.errors import Interrupted, StoreError
from gdro_cli.files import json_bytes, parse_json, sha256, write_bytes, write_json
from gdro_cli.identity import digest
from gdro_cli.models.adapters import merged
from gdro_cli.models.base import Conditioning
from gdro_cli.rewards.pool import Pool, ScoringStopped
from gdro_cli.runtime.metrics import ValidationRow
from gdro_cli.stages.evaluation.measures import GROUP_SIGNALS, quality_measures
from gdro_cli.stages.evaluation.quality import Rated, joined, pair_verdict, rate
from gdro_cli.stages.reporting.image_sheet import SheetRow, draw_sheet, source_row
from gdro_cli.stages.sampling.fill_store import decode_images, sample_images
from gdro_cli.stages.scoring.score_rows import Slot, score_images, why_none
from gdro_cli.stages.setup.scorers import open_judge_pool, open_reward_pool
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.sources import encode_prompts
from gdro_cli.stages.setup.store import SamplingPlan, evaluation_plan

FOLDER = "validation"
_BASE = "base.json"


class PointGivenUp(Interrupted):
    """The user asked to stop while the images of an evaluation point were scored, and the scores did not come soon.

    All processes raise it.
    """


@dataclass(frozen=True, slots=True)
class Protocol:
    """Digests of what evaluation points must share."""

    points: str
    """Of points of one curve."""
    measures: str
    """Of points that can be compared, except by the reward that is trained on."""
    base: str
    """Of points whose untrained model has the same rows and images."""


def validation_plan(session: Session) -> SamplingPlan:
    """How the images of an evaluation point are sampled."""
    return evaluation_plan(session, images_per_prompt=session.recipe.eval.validation_images_per_prompt)


def validation_protocol(session: Session) -> Protocol:
    """What the evaluation points of a recipe depend on, beside the adapter."""
    recipe, model, judge = session.recipe, session.model, session.judge
    versions = [session.reward_version, None if judge is None else dict(judge.version)]
    images = [*astuple(validation_plan(session)), session.prompts("validation").digest]
    identity = {key: value for key, value in model.identity.items() if key != "path"}
    text = [identity, str(model.dtype), recipe.model.max_sequence_length]
    return Protocol(
        points=digest([*images, recipe.eval.weights, *versions, {"trained on": session.reward.trained_on}]),
        measures=digest([*images, recipe.eval.weights, *versions, *text]),
        base=digest([*images, *versions, *text, recipe.eval.grid_prompts]),
    )


@dataclass(slots=True)
class Validation:
    """Samples, scores and judges the validation prompts. They are encoded once, and the scoring processes stay up.

    The job's processes share the sampling. The main process scores and judges, and only it knows the results.
    """

    session: Session
    prompts: PromptSet
    plan: SamplingPlan
    conditioning: list[Conditioning]
    folder: Path
    """For the base model's rows and the image sheets."""
    rewards: Pool | None
    """None in the other processes."""
    judges: Pool | None
    """None where there is no judge, and in the other processes."""
    protocol: str
    """Digest of what two points must share to be compared."""
    shared: Path
    """Folder of the base model's rows that all runs of the workspace share."""
    base: Rated | None = field(default=None)
    """The untrained model's images, to which verdicts compare."""
    base_seconds: float = 0.0
    """Wall time of measuring or reading them."""
    base_known: bool = False
    """Whether ``know_base`` has run."""

    @classmethod
    def open(cls, session: Session, run: Path, stack: ExitStack, *, rewards: Pool | None = None) -> Validation:
        """Encode the prompts and start the scoring processes, which end with ``stack``; ``rewards`` already runs."""
        engine, prompts = session.engine, session.prompts("validation")
        conditioning = encode_prompts(session.model, prompts.records)
        session.model.release_encoders()
        protocol = engine.from_main(lambda: validation_protocol(session))
        judges = None
        if engine.is_main:
            rewards = rewards or stack.enter_context(open_reward_pool(session, sharing=1))
            judges = open_judge_pool(session, sharing=1)
            if judges is not None:
                stack.enter_context(judges)
        return cls(
            session=session,
            prompts=prompts,
            plan=validation_plan(session),
            conditioning=conditioning,
            folder=run / FOLDER,
            rewards=rewards,
            judges=judges,
            protocol=protocol.points,
            shared=run.parent.parent / FOLDER / protocol.base,
        )

    def know_base(self, without_adapter: Callable[[], AbstractContextManager[object]]) -> None:
        """Read the base model's rows of an earlier start or another run, or measure them in ``without_adapter()``.

        Once; all processes together.
        """
        if self.base_known:
            return
        began = time.perf_counter()
        self.base_known = True
        if not self.session.engine.from_main(self._recall_base):
            with without_adapter():
                self.base = self.look(step=0)
            with self.session.engine.together():
                if self.base is not None:
                    self._keep_base(self.base)
        self.base_seconds = time.perf_counter() - began

    def _recall_base(self) -> bool:
        """Read the base model's rows of an earlier start or another run, if there are any."""
        self.base = _read_base(self.folder / _BASE, self.protocol, self._slots)
        if self.base is not None:
            return True
        self.base = _read_base(self.shared / _BASE, self.shared.name, self._slots)
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

    def measure(self, step: int) -> tuple[ValidationRow, Verdict | None] | None:
        """The row of an evaluation point for the present adapter, and the verdict on it.

        All processes together; None in all but the main one.

        Raises:
            StoreError: no image could be scored.
            PointGivenUp: the user asked to stop, and the scores did not come soon.
            EndedElsewhere: an error in another process.
        """
        began = time.perf_counter()
        is_base = self.session.engine.from_main(lambda: self._base_serves(step))
        rated = self.base if is_base else self.look(step=step)
        with self.session.engine.together():
            return None if rated is None else self._row(step, rated, is_base, began)

    def _base_serves(self, step: int) -> bool:
        """Whether the base model's images are the adapter's: at step 0 it has not learnt and changes nothing."""
        drawn = self._sheet(0).is_file() or not self.session.recipe.eval.grid_prompts
        return step == 0 and drawn and self.base is not None

    def _row(self, step: int, rated: Rated, is_base: bool, began: float) -> tuple[ValidationRow, Verdict | None]:
        samples, reward = self.session.recipe.eval.bootstrap, self.session.reward
        interval = rated.values(Measure("reward", reward.trained_on)).interval(samples=samples)
        measures = {measure.name: rated.values(measure) for measure in (reward.measures[0], *quality_measures(reward))}
        verdict = None if self.base is None else pair_verdict(reward, self.base, rated, samples=samples)
        row = {
            **{name: values.interval(samples=samples).mean for name, values in measures.items() if values.complete},
            "step": step,
            "protocol": self.protocol,
            "reward": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "verdict": None if verdict is None else verdict.level,
            "prompts": interval.prompts,
            "images": interval.images,
            "failed": rated.failed,
            "unjudged": rated.unjudged if rated.judged else None,
            "seconds": time.perf_counter() - began + (self.base_seconds if is_base else 0.0),
        }
        return ValidationRow.model_validate(row), verdict

    def look(self, *, step: int) -> Rated | None:
        """Sample, all processes together, and score and judge in the main one; None in the others."""
        seeds = [
            [self.plan.image_seed(prompt.id, index) for index in range(self.plan.images_per_prompt)]
            for prompt in self.prompts.records
        ]
        size, engine = self.session.recipe.sample.batch_size, self.session.engine
        with merged(self.session.model):
            latents = sample_images(
                self.session.model, self.conditioning, seeds, self.plan, batch_size=size, split=engine
            )
        rated, given_up = None, False
        with engine.together():
            try:
                rated = self._rated(latents, step) if engine.is_main else None
            except ScoringStopped:
                given_up = True
        if engine.any(given_up):
            raise PointGivenUp(
                f"stopped while the images of step {step} were scored; run the same command again to continue"
            )
        return rated

    def _rated(self, latents: Tensor, step: int) -> Rated:
        """Score and judge the images, and draw the sheet of images of a step."""
        if self.rewards is None:
            raise RuntimeError("only the main process scores")
        session = self.session
        count, reward = self.plan.images_per_prompt, session.reward
        images = decode_images(session.model, latents, self.plan, batch_size=session.recipe.sample.batch_size)

        def rows(pool: Pool) -> list[ScoreRow]:
            return score_images(pool, images, self._slots, stop=session.stop)

        scored = rows(self.rewards)
        if all(row.value is None for row in scored):
            why = why_none(row.reason for row in scored)
            raise StoreError(f"none of the {len(scored)} validation images could be scored {why}")
        judged: list[ScoreRow] | list[None] = [None] * len(scored) if self.judges is None else rows(self.judges)
        full = [joined(reward, row, judgement) for row, judgement in zip(scored, judged, strict=True)]
        if shown := self.prompts.records[: session.recipe.eval.grid_prompts]:
            drawn: dict[str, SheetRow] = {
                f"step {step}": [(images[i * count], full[i * count]) for i in range(len(shown))]
            }
            sheet = source_row(shown) | drawn
            draw_sheet(self._sheet(step), [prompt.prompt for prompt in shown], sheet, reward=reward)
        return rate(reward, self.prompts.records, full, images, judged=self.judges is not None)

    @property
    def _slots(self) -> list[Slot]:
        """The prompt of each image, and its index among the prompt's images."""
        count = self.plan.images_per_prompt
        return [(prompt, index) for prompt in self.prompts.records for index in range(count)]

    def _sheet(self, step: int, folder: Path | None = None) -> Path:
        return (folder or self.folder) / f"step-{step:06d}.png"


def _copy(source: Path, target: Path) -> None:
    """Copy a sheet of images, if there is one."""
    if source.is_file():
        write_bytes(target, source.read_bytes())


class _BaseFile(BaseModel):
    """The base model's rows on the disk; the file also has the SHA-256 of all this."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    protocol: str
    judged: bool
    groups: dict[str, dict[str, float | None]]
    rows: tuple[ScoreRow, ...]


def _write_base(path: Path, protocol: str, base: Rated) -> None:
    rows = [row.to_json() for row in base.rows]
    content = {"protocol": protocol, "judged": base.judged, "groups": base.groups, "rows": rows}
    write_json(path, content | {"sha256": sha256(json_bytes(content))})


def _read_base(path: Path, protocol: str, slots: Sequence[Slot]) -> Rated | None:
    """The rows of a file, for these prompts and places; None where it is missing, of another protocol, or damaged.

    The base model is then measured again.
    """
    try:
        content = parse_json(path.read_bytes())
        digest = content.pop("sha256")
        saved = _BaseFile.model_validate_json(json_bytes(content))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    prompts = tuple(dict.fromkeys(prompt for prompt, _ in slots))
    valid = (
        digest == sha256(json_bytes(content))
        and content == saved.model_dump(mode="json")
        and saved.protocol == protocol
        and [(row.prompt_id, row.index) for row in saved.rows] == [(prompt.id, index) for prompt, index in slots]
        and saved.groups.keys() == {prompt.id for prompt in prompts}
        and all(signals.keys() == set(GROUP_SIGNALS) for signals in saved.groups.values())
    )
    return Rated(prompts, saved.rows, saved.groups, saved.judged) if valid else None
