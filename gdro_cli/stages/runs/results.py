"""results.json of a run as others read it: checked, so that a damaged file is one sentence and not a wrong number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gdro_cli.errors import StoreError
from gdro_cli.rewards.registry import reward_class
from gdro_cli.runtime.run import RunFolder

RESULTS_KIND = "gdro results"
RESULTS_SCHEMA = 2
_MOST_SAMPLES = 1_000_000

_LONGEST_NAME = 1000

Name = Annotated[str, Field(max_length=_LONGEST_NAME)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    """What must be there; what else is there is left alone."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Mean(_Part):
    mean: float | None
    low: float | None
    high: float | None


class _Sides(_Part):
    base: _Mean | None
    trained: _Mean | None
    difference: _Mean | None


class _Verdict(_Part):
    level: Name | None
    reasons: list[str]


class _Weights(_Part):
    kind: Name
    checkpoint: Name
    step: Count


class _Text(_Part):
    prompt: str


class _Pictures(_Part):
    base: list[dict[str, Any]]
    trained: list[dict[str, Any]]


class _Shown(_Part):
    """What a model card tells."""

    measures: dict[Name, _Sides]
    signals: dict[Name, _Sides]
    verdict: _Verdict | None
    weights: _Weights
    protocol: dict[str, Any]
    protocol_name: Name
    failed: Count
    unjudged: Count
    seen: Count
    prompts: list[_Text]
    images: _Pictures


class _Interval(_Part):
    model_config = ConfigDict(extra="forbid")

    mean: float
    low: float
    high: float
    prompts: Count
    images: Count
    level: float


class _Measure(_Part):
    base: _Interval | None
    trained: _Interval | None
    difference: _Interval | None


class _Prompt(_Part):
    id: str
    prompt: str
    target: str | None
    metadata: dict[str, Any]


class _Row(_Part):
    prompt_id: str
    index: Count
    value: float | None
    reason: str | None
    details: dict[str, Any]


class _Images(_Part):
    base: list[_Row]
    trained: list[_Row]


class _Method(_Part):
    name: Name


class _Compared(_Part):
    """What a comparison reads."""

    recipe: Name
    task: Name
    run: Name
    method: _Method
    protocol: dict[str, Any]
    measures: Annotated[dict[Name, _Measure], Field(min_length=1)]
    verdict: _Verdict | None
    weights: _Weights
    failed: Count
    unjudged: Count
    bootstrap: Annotated[int, Field(ge=1, le=_MOST_SAMPLES)]
    prompts: Annotated[list[_Prompt], Field(min_length=1)]
    images: _Images


def read_shown(run: RunFolder) -> dict[str, Any]:
    """The results of a finished run as far as its card tells them. Raises StoreError."""
    return _read(run, _Shown)


def read_results(run: RunFolder) -> dict[str, Any]:
    """The results of a run as a comparison needs them.

    Raises:
        StoreError: the file is damaged, or another version wrote it.
    """
    return _read(run, _Compared, _refuse_other, _refuse_torn)


def _read(run: RunFolder, form: type[_Part], *checks: Callable[[str, dict[str, Any]], None]) -> dict[str, Any]:
    results: dict[str, Any] = run.read_json("results.json")  # if the first check says so
    path = str(run.path / "results.json")
    first, *others = checks or (_refuse_other_kind,)
    first(path, results)
    try:
        form.model_validate(results)
    except ValidationError as error:
        where = ".".join(str(part)[:40] for part in error.errors()[0]["loc"])
        raise StoreError(f"{path} is damaged at {where}: run `gdro eval` with its recipe again") from error
    for check in others:
        check(path, results)
    return results


def _refuse_other_kind(path: str, results: Any) -> None:
    if not isinstance(results, dict):
        raise StoreError(f"{path} does not hold results of an evaluation: run `gdro eval` with its recipe again")


def _refuse_other(path: str, results: Any) -> None:
    if not isinstance(results, dict) or results.get("kind") != RESULTS_KIND:
        raise StoreError(f"{path} does not hold results of an evaluation: run `gdro eval` with its recipe again")
    if results.get("schema") != RESULTS_SCHEMA:
        raise StoreError(
            f"{path} has schema {str(results.get('schema'))[:40]}, this version reads {RESULTS_SCHEMA}: run `gdro eval`"
            " with its recipe again"
        )


def _refuse_torn(path: str, results: dict[str, Any]) -> None:
    """Rows of prompts that are not there, and prompts without a tag where the reward's measures need it."""
    known = {prompt["id"] for prompt in results["prompts"]}
    strange = [row for rows in results["images"].values() for row in rows if row["prompt_id"] not in known]
    by_tag = any(measure.by_tag for measure in reward_class(results["task"]).measures)
    untagged = by_tag and any("tag" not in prompt["metadata"] for prompt in results["prompts"])
    if strange or untagged:
        where = "images" if strange else "prompts"
        raise StoreError(f"{path} is damaged at {where}: run `gdro eval` with its recipe again")
