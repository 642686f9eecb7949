"""The rows of a run's ``metrics.jsonl``; docs/metrics.md says what each number means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from gdro_cli.core.verdict import Level

Count = Annotated[int, Field(ge=0)]


class _Row(BaseModel):
    """What every row has. Fields that are not declared are numbers, such as a reward's own headline measure."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, extra="allow")
    __pydantic_extra__: dict[str, float | None] = Field(init=False)

    kind: str
    step: Count
    """Optimizer steps taken; 0 is the untrained model."""
    seconds: float | None = None

    def get(self, name: str, default: Any = None) -> Any:
        """The value of that name, whether or not it is a declared field; ``default`` where it is missing."""
        value = self.__dict__.get(name)
        value = (self.__pydantic_extra__ or {}).get(name) if value is None else value
        return default if value is None else value

    def __getitem__(self, name: str) -> Any:
        return self.get(name)

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object, without what is missing."""
        return self.model_dump(mode="json", exclude_none=True)


class TrainRow(_Row):
    """One optimizer step. Each method has some of these numbers; ``s_rank_1`` ... ``s_rank_K`` are not declared."""

    kind: Literal["train"] = "train"
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    gpu_peak_gb: float | None = None
    micro_batch: Count | None = None
    images_per_second: float | None = None
    tflops: float | None = None
    # group methods
    loss_method: float | None = None
    loss_stabiliser: float | None = None
    loss_floor: float | None = None
    implicit_accuracy: float | None = None
    top1_error_gap: float | None = None
    bottom1_error_gap: float | None = None
    entropy_p: float | None = None
    entropy_q: float | None = None
    dropped_groups_share: float | None = None
    # online methods
    ratio_mean: float | None = None
    clip_fraction: float | None = None
    approx_kl: float | None = None
    kl: float | None = None
    images: Count | None = None
    round: Count | None = None
    reward: float | None = None
    reward_group_std: float | None = None
    no_advantage: float | None = None
    failed: Count | None = None
    seconds_sampling: float | None = None
    seconds_scoring: float | None = None
    seconds_updates: float | None = None


class ValidationRow(_Row):
    """One evaluation point. The reward's headline measure, where it has another name, is not declared."""

    kind: Literal["validation"] = "validation"
    protocol: str
    """Digest of what two points must share to be compared."""
    reward: float
    low: float
    high: float
    alignment: float | None = None
    coherence: float | None = None
    style: float | None = None
    u: float | None = None
    corrected: float | None = None
    verdict: Level | None = None
    prompts: Count
    images: Count
    failed: Count
    unjudged: Count | None = None
    """None without a judge."""

    @property
    def numbers(self) -> dict[str, float]:
        """All numbers but the step."""
        return {name: value for name, value in self.to_json().items() if name != "step" and not isinstance(value, str)}


MetricsRow = TrainRow | ValidationRow
_ROW: TypeAdapter[MetricsRow] = TypeAdapter(Annotated[MetricsRow, Field(discriminator="kind")])


def read_row(line: str | bytes) -> MetricsRow:
    """Read a line of the file. Raises ValueError for anything but a row."""
    return _ROW.validate_json(line)


def train_rows(rows: Iterable[MetricsRow]) -> list[TrainRow]:
    """The optimizer steps among a run's rows."""
    return [row for row in rows if isinstance(row, TrainRow)]


def validation_rows(rows: Iterable[MetricsRow]) -> list[ValidationRow]:
    """The evaluation points among a run's rows."""
    return [row for row in rows if isinstance(row, ValidationRow)]
