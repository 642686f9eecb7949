"""The report of an evaluation: one page of numbers, curves and images together, and a table of all images.

The page draws no conclusion of its own: the verdict and the intervals are those of ``Results``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from gdro_cli.core.verdict import LIMITS, Change
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.shards import source_name
from gdro_cli.files import write_bytes
from gdro_cli.rewards.base import Reward
from gdro_cli.rewards.registry import reward_class
from gdro_cli.runtime.metrics import MetricsRow, train_rows, validation_rows
from gdro_cli.stages.reporting.csv_table import csv_bytes
from gdro_cli.stages.reporting.html import data_uri, flat, render
from gdro_cli.stages.reporting.number_format import MISSING, number, signed
from gdro_cli.stages.reporting.redaction import last_part
from gdro_cli.stages.runs.results import MODELS, ImageRow, Results

QUALITY = ("alignment", "coherence", "style", "u", "corrected", "corrected of the means")
"""What a judge adds to a reward's measures."""
SHOWN_IMAGES = 2
"""Images shown of each prompt and model."""
SHOWN_CASES = 4
"""Largest losses, and as many gains."""
WINDOW = 20
"""Steps over which the training's first and last values are averaged, at most a quarter of it."""

SIGNALS: Mapping[str, str] = {
    "dark_share": "share of dark pixels",
    "edge_density": "share of pixels on an edge",
    "colour_entropy": "variety of colours, in bits",
    "high_frequency": "share of the contrast in the finest details",
    "stripe_peak": "share of the contrast in the strongest stripes",
    "diversity": "how far apart the images of a prompt are",
    "rank_disagreement": "share of pairs that reward and judge order differently",
}
"""What every image or group of images has; a reward may add its own."""
DIAGNOSTICS: Mapping[str, str] = {
    "implicit_accuracy": "pairs that the implicit reward orders as the reward does (0.5 is guessing)",
    "top1_error_gap": "error on the best image minus the reference's (above 0: it is being unlearned)",
    "bottom1_error_gap": "error on the worst image minus the reference's",
    "entropy_p": "entropy of the policy over a group, in nats",
    "entropy_q": "entropy of the rewards' distribution over a group, in nats",
    "reward": "reward of the images that a round drew with noise and in few steps",
    "reward_group_std": "standard deviation of the rewards of a group",
    "no_advantage": "share of the round's images that nothing is learnt from",
    "clip_fraction": "share of likelihood ratios outside the clip range",
    "approx_kl": "how far the policy has gone since it drew the round's images, in nats per latent value",
    "kl": "divergence from the base model",
    "loss": "training loss",
    "images_per_second": "images that the training learnt from per second, over all processes",
    "tflops": "TFLOP/s of each GPU in training (operations counted from shapes)",
    "gpu_peak_gb": "peak memory of the first GPU, in 1e9 bytes",
}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table of measures or signals."""

    name: str
    change: Change
    missing: tuple[str, ...] = ()
    note: str = ""
    relative: str = ""
    limits: str = ""

    @property
    def prompts(self) -> tuple[str, ...]:
        """What was counted, one text if it is the same for both models and for the pairs."""
        return self._counts("prompts")

    @property
    def images(self) -> tuple[str, ...]:
        """As ``prompts``."""
        return self._counts("images")

    def _counts(self, key: str) -> tuple[str, ...]:
        counts = [getattr(side, key) for side in (self.change.base, self.change.trained, self.change.difference)]
        if len(set(counts)) == 1:
            return (str(counts[0]),)
        return tuple(f"{name} {count}" for name, count in zip((*MODELS, "pairs"), counts, strict=True))


@dataclass(frozen=True, slots=True)
class Shot:
    """An image with what is known of it."""

    model: str
    """Or ``source``, the image that the prompt edits."""
    index: int | None
    source: str | None
    """Data URI; None when the file is missing or damaged."""
    alt: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt with images of both models, and by how much they differ."""

    prompt: PromptRecord
    shots: tuple[Shot, ...]
    change: float | None = None


def write_report(
    path: Path,
    results: Results,
    metrics: Sequence[MetricsRow],
    *,
    workspace: Path,
    recipe: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> Path:
    """Write the report of an evaluation as one HTML file that needs nothing else; returns ``path``.

    Args:
        path: the file, replaced if it exists.
        results: the evaluation.
        metrics: the rows of the run's metrics.jsonl.
        workspace: the folder that the rows' ``file`` is relative to. A missing image is said to be missing.
        recipe: the resolved recipe.
        environment: what the run ran on.

    Raises:
        StoreError: it cannot be written.
    """
    reward = reward_class(results.task)
    names, tags = measure_names(results.measures, reward), {m.name: m.tag for m in reward.measures}
    headline = next(iter(names), "reward")
    ranked_by = "corrected" if "corrected" in names else None
    losses, gains = _extremes(results, ranked_by)
    initial = recipe["train"]["lora"]["init"]
    page = render(
        "report.html.j2",
        results=results,
        judged=any(name in QUALITY for name in names),
        images=len(results.images.base) + len(results.images.trained),
        measures=[_measure_line(results, name, tags.get(name)) for name in names if name not in QUALITY],
        quality=[_measure_line(results, name) for name in (headline, *QUALITY) if name in results.measures],
        rewarded=reward.measures[0].detail or "reward",
        signals=[_signal_line(*signal) for signal in signal_rows(results.signals, reward)],
        **_curves(metrics, headline=headline, marked=results.weights.step),
        diagnostics=_diagnostics(metrics),
        cases=_first_cases(results, workspace, count=recipe["eval"]["grid_prompts"]),
        losses=[_case(results, *pair, workspace) for pair in losses],
        gains=[_case(results, *pair, workspace) for pair in gains],
        ranked_by="corrected score" if ranked_by else "reward",
        protocol=list(flat(results.protocol)),
        initial=None if initial is None else last_part(initial),
        recipe=list(flat(recipe)),
        environment=list(flat(environment)),
    )
    write_bytes(path, page)
    return path


def write_csv(path: Path, results: Results) -> Path:
    """Write one row per image and model, with every number and text that is known of it; returns ``path``.

    A missing number is an empty cell, never 0; true and false are 1 and 0. Raises StoreError when it cannot be written.
    """
    reward = reward_class(results.task)
    rows = [(model, row, reward.cells(row.details)) for model in MODELS for row in results.rows(model)]
    first = (*reward.columns, *QUALITY, "unjudged", *SIGNALS, *reward.signals)
    columns = ordered({name for _, _, cells in rows for name in cells}, first)
    prompts = {prompt.id: prompt.prompt for prompt in results.prompts}
    table: list[list[Any]] = [["model", "prompt_id", "index", "prompt", "value", *columns, "reason", "file"]]
    for model, row, cells in rows:
        head = [model, row.prompt_id, row.index, prompts[row.prompt_id], row.value]
        table.append([*head, *(cells.get(name) for name in columns), row.reason, row.file])
    write_bytes(path, csv_bytes(table))
    return path


def measure_names(names: Iterable[str], reward: type[Reward]) -> list[str]:
    """Names of measures in the order of reports, the headline first: JSON files are sorted by name."""
    return ordered(names, (*(measure.name for measure in reward.measures), *QUALITY))


def signal_rows(signals: Mapping[str, Change], reward: type[Reward]) -> list[tuple[str, str, Change]]:
    """Name, meaning and intervals of each signal, in the order of reports."""
    meanings = {**SIGNALS, **reward.signals}
    return [(name, meanings.get(name, ""), signals[name]) for name in ordered(signals, tuple(meanings))]


def ordered(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """``names`` in the given order, other names last."""
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


# -- tables -----------------------------------------------------------------------------------------------------------


def _measure_line(results: Results, name: str, tag: str | None = None) -> Line:
    """A measure with its counts; a tag's measure is about the prompts of that tag only."""
    prompts = {prompt.id for prompt in results.prompts if tag is None or prompt.metadata.get("tag") == tag}
    change, missing = results.measures[name], []
    for model in MODELS:
        total = sum(row.prompt_id in prompts for row in results.rows(model))
        count = total - getattr(change, model).images
        missing += [f"{model} {count} of {total}"] if count else []
    return Line(name, change, missing=tuple(missing) or ("none",))


def _signal_line(name: str, meaning: str, change: Change) -> Line:
    base, difference = change.base.mean, change.difference.mean
    relative = f"{round(100 * difference / abs(base)):+d} %" if base else MISSING
    return Line(name, change, note=meaning, relative=relative, limits=_limits(name))


def _limits(name: str) -> str:
    """From which change on a signal speaks against a model, and for a collapse."""
    signal = LIMITS.signals.get(name)
    if signal is None:
        return MISSING
    sign = {"up": "+", "down": "-", "either": "\N{PLUS-MINUS SIGN}"}[signal.worse]
    scale, unit = (100, " %") if signal.relative else (1, "")
    return " / ".join(f"{sign}{scale * limit:g}{unit}" for limit in (signal.suspicious, signal.collapsed))


# -- the training -----------------------------------------------------------------------------------------------------


def _curves(metrics: Sequence[MetricsRow], *, headline: str, marked: int) -> dict[str, Any]:
    from gdro_cli.stages.reporting import charts  # loads matplotlib, which `gdro train` never needs

    points, steps = validation_rows(metrics), train_rows(metrics)
    latest = [row for row in points if row.protocol == points[-1].protocol]
    return {
        "curves": {
            "validation": charts.validation_chart(latest, headline=headline, marked=marked),
            "axes": charts.axes_chart(latest, marked=marked),
            "order": charts.order_chart(steps, marked=marked),
            "gaps": charts.gap_chart(steps, marked=marked),
            "rounds": charts.rounds_chart(steps, marked=marked),
        },
        "points": latest,
        "other_points": len(points) - len(latest),
    }


def _diagnostics(metrics: Sequence[MetricsRow]) -> list[tuple[str, str, str, str, int]]:
    """Name, meaning, mean over the first and over the last steps, and how many steps each mean is of."""
    lines, rows = [], train_rows(metrics)
    for name, meaning in DIAGNOSTICS.items():
        values = [value for row in rows if (value := row.get(name)) is not None]
        if values:
            window = min(WINDOW, max(1, len(values) // 4))
            show = signed if name.endswith("_gap") else number
            lines.append((name, meaning, show(fmean(values[:window])), show(fmean(values[-window:])), window))
    return lines


# -- images -----------------------------------------------------------------------------------------------------------

_Pair = tuple[float, ImageRow, ImageRow]
"""Trained - base, and the rows of base and trained."""


def _first_cases(results: Results, workspace: Path, *, count: int) -> list[Case]:
    """The first prompts with the first images of both models, the same noise side by side."""
    cases = []
    for prompt in results.prompts[:count]:
        rows = [(model, row) for model in MODELS for row in results.rows(model) if row.prompt_id == prompt.id]
        indices = sorted({row.index for _, row in rows})[:SHOWN_IMAGES]
        cases.append(_shots(results, prompt, [pair for i in indices for pair in rows if pair[1].index == i], workspace))
    return cases


def _extremes(results: Results, detail: str | None) -> tuple[list[_Pair], list[_Pair]]:
    """The pairs of images with the largest losses and gains (trained - base), equal ones in the order of the rows."""
    trained = {(row.prompt_id, row.index): row for row in results.images.trained}
    pairs: list[_Pair] = []
    for before in results.images.base:
        after = trained.get((before.prompt_id, before.index))
        values = [None if row is None else row.measured(detail) for row in (before, after)]
        if after is not None and values[0] is not None and values[1] is not None:
            pairs.append((values[1] - values[0], before, after))
    pairs.sort(key=lambda pair: pair[0])
    losses = [pair for pair in pairs if pair[0] < 0]
    gains = sorted((pair for pair in pairs if pair[0] > 0), key=lambda pair: pair[0], reverse=True)
    return losses[:SHOWN_CASES], gains[:SHOWN_CASES]


def _case(results: Results, change: float, before: ImageRow, after: ImageRow, workspace: Path) -> Case:
    (prompt,) = (prompt for prompt in results.prompts if prompt.id == before.prompt_id)
    return _shots(results, prompt, zip(MODELS, (before, after), strict=True), workspace, change)


def _shots(
    results: Results,
    prompt: PromptRecord,
    rows: Iterable[tuple[str, ImageRow]],
    workspace: Path,
    change: float | None = None,
) -> Case:
    reward, listed = reward_class(results.task), list(rows)
    shots = [
        Shot(
            model=model,
            index=row.index,
            source=data_uri(workspace / row.file) if row.file else None,
            alt=f"{model} model, image {row.index}: {prompt.prompt}",
            facts=tuple(_facts(row, reward)),
        )
        for model, row in listed
    ]
    edited = next((workspace / row.file for _, row in listed if row.file), None) if prompt.image_sha256 else None
    if edited is not None:
        file = edited.with_name(source_name(prompt.id, edited.suffix[1:]))
        shots.insert(0, Shot("source", None, data_uri(file), f"the image to edit: {prompt.prompt}", ()))
    return Case(prompt, tuple(shots), change)


def _facts(row: ImageRow, reward: type[Reward]) -> Iterator[tuple[str, str]]:
    """What stands below an image, name and value."""
    details = row.details
    yield "reward", number(row.value)
    if row.reason:
        yield "no reward", row.reason
    yield from reward.facts(details)
    if "u" in details:
        yield "u", number(details["u"])
        yield "corrected", number(details.get("corrected"))
        if details["u"] is None and details.get("unjudged"):
            yield "not judged", str(details["unjudged"])
