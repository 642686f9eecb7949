"""``results.json`` of a run: what one evaluation found. docs/evaluation.md explains its keys.

A file is read as strictly as it is written, so that a damaged one is one sentence and not a wrong number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gdro_cli.core.verdict import Change, Verdict
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.scores import ScoreRow
from gdro_cli.errors import StoreError
from gdro_cli.files import read_file
from gdro_cli.rewards.registry import reward_class

RESULTS = "results.json"
KIND: Literal["gdro results"] = "gdro results"
SCHEMA: Literal[2] = 2
MODELS: tuple[Literal["base", "trained"], ...] = ("base", "trained")
_MOST_SAMPLES = 1_000_000
_AGAIN = "run `gdro eval` with its recipe again"

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class ImageRow(ScoreRow):
    """All that was measured in one image."""

    file: str | None = None
    """The image, relative to the workspace."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Weights(_Part):
    """Which weights of the run were evaluated."""

    kind: str
    """``ema`` or ``raw``."""
    checkpoint: str
    """``best`` or ``last``."""
    step: Count
    chosen_by: dict[str, Any] | None = None
    """Measure, score, verdict and validation protocol by which the best point was chosen; None for the last step."""

    def __str__(self) -> str:
        return f"{self.kind} weights of the {self.checkpoint} checkpoint, step {self.step}"


class Images(_Part):
    """The rows of both models' images."""

    base: tuple[ImageRow, ...]
    trained: tuple[ImageRow, ...]


class Results(_Part):
    """One evaluation of a run: base against trained model on the held-out prompts."""

    kind: Literal["gdro results"]
    schema_: Literal[2] = Field(alias="schema")
    recipe: str
    task: str
    method: dict[str, Any]
    """The method's section of the recipe."""
    run: str
    protocol: dict[str, Any]
    """What two results must share to be compared."""
    protocol_name: str
    weights: Weights
    measures: dict[str, Change]
    """By name: those of the reward, then those of the judge. Read from a file they are sorted by name."""
    signals: dict[str, Change]
    verdict: Verdict
    failed: Count
    """Images without a reward, base and trained together."""
    unjudged: Count
    """Images without u, base and trained together, where there is a judge."""
    seen: Count
    """Prompts that are also in the training or validation prompts."""
    bootstrap: Annotated[int, Field(ge=1, le=_MOST_SAMPLES)]
    grid: str | None
    """The image grid, relative to the run."""
    prompts: Annotated[tuple[PromptRecord, ...], Field(min_length=1)]
    images: Images

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        known = {prompt.id for prompt in self.prompts}
        if any(row.prompt_id not in known for row in (*self.images.base, *self.images.trained)):
            raise ValueError("images of unknown prompts")
        by_tag = any(measure.by_tag for measure in reward_class(self.task).measures)
        if by_tag and any("tag" not in prompt.metadata for prompt in self.prompts):
            raise ValueError("prompts without a tag")
        return self

    @property
    def judged(self) -> bool:
        """Whether there was a judge."""
        return self.protocol.get("judge") is not None

    def rows(self, model: Literal["base", "trained"]) -> tuple[ImageRow, ...]:
        """The rows of one model's images."""
        return self.images.base if model == "base" else self.images.trained

    def to_json(self) -> dict[str, Any]:
        """The results as a JSON object."""
        return self.model_dump(mode="json", by_alias=True)


def read_results(run: Path) -> Results:
    """The results of a run.

    Raises:
        StoreError: the file is missing or damaged, or another version wrote it.
        UserError: its reward is not in this installation.
    """
    path = run / RESULTS
    data = read_file(path, remedy=_AGAIN)
    try:
        return Results.model_validate_json(data)
    except ValidationError as error:
        raise StoreError(f"{path} {_fault(error)}: {_AGAIN}") from error


def _fault(error: ValidationError) -> str:
    faults = {fault["loc"]: fault for fault in error.errors(include_url=False)}
    first = next(iter(faults.values()))
    if ("kind",) in faults or first["type"] == "model_type":
        return "does not hold results of an evaluation"
    if ("schema",) in faults:
        return f"has schema {str(faults['schema',]['input'])[:40]}, this version reads {SCHEMA}"
    if first["type"] == "json_invalid":
        return "is damaged (it is not JSON)"
    where = ".".join(str(part)[:40] for part in first["loc"])
    return f"is damaged at {where}" if where else f"is damaged ({first['ctx']['error']})"
