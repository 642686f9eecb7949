"""The report of an evaluation: one page that shows numbers, curves and pictures together, and a table of all pictures.

The page draws no conclusion of its own: the verdict and the intervals are those of results.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from gdro_cli.core.verdict import LIMITS
from gdro_cli.files import write_bytes
from gdro_cli.rewards.base import Reward
from gdro_cli.rewards.registry import reward_class
from gdro_cli.stages.reporting import charts
from gdro_cli.stages.reporting.csv_table import csv_bytes
from gdro_cli.stages.reporting.html import MISSING, flat, number, picture, render, signed

MODELS = ("base", "trained")
QUALITY = ("alignment", "coherence", "style", "u", "corrected")
"""What a judge adds to a reward's measures."""
SHOWN_PROMPTS = 8
"""Prompts whose pictures are shown where the recipe does not say."""
SHOWN_IMAGES = 2
"""Pictures shown of each prompt and model."""
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
    "diversity": "how far apart the pictures of a prompt are",
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
}

Row = Mapping[str, Any]
_Pair = tuple[float, Row, Row]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table of measures or signals."""

    name: str
    base: Row | None
    trained: Row | None
    difference: Row | None
    prompts: tuple[str, ...]
    images: tuple[str, ...]
    missing: tuple[str, ...] = ()
    note: str = ""
    relative: str = ""
    limits: str = ""


@dataclass(frozen=True, slots=True)
class Shot:
    """A picture with what is known of it."""

    model: str
    index: int
    source: str | None
    """Data URI; None when the file is missing or damaged."""
    alt: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt with pictures of both models, and by how much they differ."""

    prompt: Row
    shots: tuple[Shot, ...]
    change: float | None = None


def write_report(
    path: Path,
    results: Mapping[str, Any],
    metrics: Sequence[Row],
    *,
    workspace: Path,
    recipe: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> Path:
    """Write the report of an evaluation as one HTML file that needs nothing else; returns ``path``.

    Args:
        path: the file, replaced if it is there.
        results: what results.json holds.
        metrics: the rows of the run's metrics.jsonl.
        workspace: the folder that the rows' ``file`` is relative to; a picture that is not there is said to be missing.
        recipe: the resolved recipe.
        environment: what the run ran on.

    Raises:
        StoreError: it cannot be written.
    """
    reward = reward_class(results["task"])
    names, tags = measure_names(results["measures"], reward), {m.name: m.tag for m in reward.measures}
    headline = next(iter(names), "reward")
    judged = any(name in QUALITY for name in names)
    has_judge = results["protocol"].get("judge") is not None
    by = "corrected" if "corrected" in names else None
    losses, gains = _extremes(results, by)
    count = _shown_prompts(recipe)
    page = render(
        "report.html.j2",
        results=results,
        judged=judged,
        has_judge=has_judge,
        weights=weights_text(results["weights"]),
        pictures=len(results["images"]["base"]) + len(results["images"]["trained"]),
        measures=[_measure_line(results, name, tags.get(name)) for name in names if name not in QUALITY],
        quality=[_measure_line(results, name) for name in (headline, *QUALITY) if name in results["measures"]],
        rewarded=reward.measures[0].detail or "reward",
        signals=[_signal_line(*signal) for signal in signal_lines(results["signals"], reward)],
        **_curves(metrics, headline=headline, marked=results["weights"]["step"]),
        diagnostics=_diagnostics(metrics),
        cases=_prompt_cases(results, workspace, count=count),
        losses=[_case(results, *each, workspace) for each in losses],
        gains=[_case(results, *each, workspace) for each in gains],
        ranked_by="corrected score" if by else "reward",
        protocol=list(flat(results["protocol"])),
        recipe=list(flat(recipe)),
        environment=list(flat(environment)),
    )
    write_bytes(path, page)
    return path


def write_csv(path: Path, results: Mapping[str, Any]) -> Path:
    """Write one row per picture and model, with every number and text that is known of it; returns ``path``.

    A missing number is an empty cell, never 0; true and false are 1 and 0. Raises StoreError when it cannot be written.
    """
    reward = reward_class(results["task"])
    rows = [(model, row, reward.cells(row["details"])) for model in MODELS for row in results["images"][model]]
    first = (*reward.columns, *QUALITY, "unjudged", *SIGNALS, *reward.signals)
    columns = ordered({name for _, _, cells in rows for name in cells}, first)
    prompts = {prompt["id"]: prompt["prompt"] for prompt in results["prompts"]}
    table: list[list[Any]] = [["model", "prompt_id", "index", "prompt", "value", *columns, "reason", "file"]]
    for model, row, cells in rows:
        head = [model, row["prompt_id"], row["index"], prompts[row["prompt_id"]], row["value"]]
        table.append([*head, *(cells.get(name) for name in columns), row["reason"], row.get("file")])
    write_bytes(path, csv_bytes(table))
    return path


def measure_names(names: Iterable[str], reward: type[Reward]) -> list[str]:
    """Names of measures in the order of reports, the headline first: JSON files are sorted by name."""
    return ordered(names, (*(measure.name for measure in reward.measures), *QUALITY))


def signal_lines(signals: Mapping[str, Row], reward: type[Reward]) -> list[tuple[str, str, Row]]:
    """Name, meaning and intervals of each signal, in the order of reports."""
    meanings = {**SIGNALS, **reward.signals}
    return [(name, meanings.get(name, ""), signals[name]) for name in ordered(signals, tuple(meanings))]


def ordered(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """``names`` in the given order, those it does not know last."""
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def weights_text(weights: Row) -> str:
    """Which weights were evaluated, as in ``ema weights of the best checkpoint, step 250``."""
    return f"{weights['kind']} weights of the {weights['checkpoint']} checkpoint, step {weights['step']}"


def _shown_prompts(recipe: Mapping[str, Any]) -> int:
    return int(recipe.get("eval", {}).get("grid_prompts", SHOWN_PROMPTS))


# -- tables -----------------------------------------------------------------------------------------------------------


def _measure_line(results: Mapping[str, Any], name: str, tag: str | None = None) -> Line:
    """A measure with its counts; a tag's measure is about the prompts of that tag only."""
    prompts = {p["id"] for p in results["prompts"] if tag is None or p["metadata"].get("tag") == tag}
    totals = [sum(row["prompt_id"] in prompts for row in results["images"][model]) for model in MODELS]
    sides = results["measures"][name]
    left = [total - _count(sides.get(model), "images") for model, total in zip(MODELS, totals, strict=True)]
    missing = [f"{model} {count} of {total}" for model, count, total in zip(MODELS, left, totals, strict=True) if count]
    return _line(name, sides, missing=tuple(missing) or ("none",))


def _signal_line(name: str, meaning: str, found: Row) -> Line:
    base, difference = found.get("base"), found.get("difference")
    relative = ""
    if base and difference and base["mean"] and difference["mean"] is not None:
        relative = f"{round(100 * difference['mean'] / abs(base['mean'])):+d} %"
    return _line(name, found, note=meaning, relative=relative or MISSING, limits=_limits(name))


def _line(name: str, found: Row, **more: Any) -> Line:
    base, trained, difference = sides = [found.get(key) for key in (*MODELS, "difference")]
    prompts, images = (_counts([_count(side, key) for side in sides]) for key in ("prompts", "images"))
    return Line(name, base, trained, difference, prompts, images, **more)


def _count(side: Row | None, key: str) -> int:
    return 0 if side is None else int(side[key])


def _counts(sides: Sequence[int]) -> tuple[str, ...]:
    """``256``, or what was counted for each model and for the pairs."""
    if len(set(sides)) == 1:
        return (str(sides[0]),)
    return tuple(f"{name} {count}" for name, count in zip((*MODELS, "pairs"), sides, strict=True))


def _limits(name: str) -> str:
    """From which change on a signal speaks against a model, and for a collapse."""
    signal = LIMITS.signals.get(name)
    if signal is None:
        return MISSING
    sign = {"up": "+", "down": "-", "either": "\N{PLUS-MINUS SIGN}"}[signal.worse]
    scale, unit = (100, " %") if signal.relative else (1, "")
    return " / ".join(f"{sign}{scale * limit:g}{unit}" for limit in (signal.suspicious, signal.collapsed))


# -- the training -----------------------------------------------------------------------------------------------------


def _curves(metrics: Sequence[Row], *, headline: str, marked: int) -> dict[str, Any]:
    points = validation_rows(metrics)
    latest = [row for row in points if row.get("protocol") == points[-1].get("protocol")]
    training = training_rows(metrics)
    return {
        "curves": {
            "validation": charts.validation_chart(latest, headline=headline, marked=marked),
            "axes": charts.axes_chart(latest, marked=marked),
            "order": charts.order_chart(training, marked=marked),
            "gaps": charts.gap_chart(training, marked=marked),
            "rounds": charts.rounds_chart(training, marked=marked),
        },
        "points": latest,
        "other_points": len(points) - len(latest),
    }


def validation_rows(metrics: Sequence[Row]) -> list[Row]:
    """The evaluation points among a run's metrics."""
    return [row for row in metrics if row.get("kind") == "validation"]


def training_rows(metrics: Sequence[Row]) -> list[Row]:
    """The training steps among a run's metrics."""
    return [row for row in metrics if row.get("kind") == "train"]


def _diagnostics(metrics: Sequence[Row]) -> list[tuple[str, str, str, str, int]]:
    """Name, meaning, mean over the first and over the last steps, and how many steps each mean is of."""
    found = []
    rows = training_rows(metrics)
    for name, meaning in DIAGNOSTICS.items():
        values = [float(row[name]) for row in rows if row.get(name) is not None]
        if values:
            window = min(WINDOW, max(1, len(values) // 4))
            first, last = fmean(values[:window]), fmean(values[-window:])
            show = signed if name.endswith("_gap") else number
            found.append((name, meaning, show(first), show(last), window))
    return found


# -- pictures ---------------------------------------------------------------------------------------------------------


def _prompt_cases(results: Mapping[str, Any], workspace: Path, *, count: int) -> list[Case]:
    """The first prompts with the first pictures of both models, the same noise side by side."""
    cases, reward = [], reward_class(results["task"])
    rows = {model: _by_prompt(results["images"][model]) for model in MODELS}
    for prompt in results["prompts"][:count]:
        indices = sorted({row["index"] for model in MODELS for row in rows[model].get(prompt["id"], ())})
        shots = [
            _shot(row, prompt, model, workspace, reward)
            for index in indices[:SHOWN_IMAGES]
            for model in MODELS
            for row in rows[model].get(prompt["id"], ())
            if row["index"] == index
        ]
        cases.append(Case(prompt, tuple(shots)))
    return cases


def _by_prompt(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["prompt_id"], []).append(row)
    return found


def _extremes(results: Mapping[str, Any], detail: str | None) -> tuple[list[_Pair], list[_Pair]]:
    """The pairs of pictures with the largest losses and gains (trained - base), equal ones in the order of the rows."""
    trained = {(row["prompt_id"], row["index"]): row for row in results["images"]["trained"]}
    pairs: list[_Pair] = []
    for before in results["images"]["base"]:
        after = trained.get((before["prompt_id"], before["index"]))
        a, b = (None if row is None else _value(row, detail) for row in (before, after))
        if after is not None and a is not None and b is not None:
            pairs.append((b - a, before, after))
    losses, gains = ([pair for pair in pairs if sign * pair[0] > 0] for sign in (-1, 1))
    return sorted(losses, key=_change)[:SHOWN_CASES], sorted(gains, key=_change, reverse=True)[:SHOWN_CASES]


def _change(pair: _Pair) -> float:
    return pair[0]


def _value(row: Row, detail: str | None) -> float | None:
    value = row["value"] if detail is None else row["details"].get(detail)
    return None if value is None else float(value)


def _case(results: Mapping[str, Any], change: float, before: Row, after: Row, workspace: Path) -> Case:
    (prompt,) = (prompt for prompt in results["prompts"] if prompt["id"] == before["prompt_id"])
    reward = reward_class(results["task"])
    shots = (_shot(row, prompt, model, workspace, reward) for model, row in zip(MODELS, (before, after), strict=True))
    return Case(prompt, tuple(shots), change)


def _shot(row: Row, prompt: Row, model: str, workspace: Path, reward: type[Reward]) -> Shot:
    source = picture(workspace / row["file"]) if row.get("file") else None
    alt = f"{model} model, image {row['index']}: {prompt['prompt']}"
    return Shot(model, row["index"], source, alt, tuple(_facts(row, reward)))


def _facts(row: Row, reward: type[Reward]) -> Iterator[tuple[str, str]]:
    """What stands below an image, name and value."""
    details = row["details"]
    yield "reward", number(row["value"])
    if row["reason"]:
        yield "no reward", str(row["reason"])
    yield from reward.facts(details)
    if "u" in details:
        yield "u", number(details["u"])
        yield "corrected", number(details.get("corrected"))
        if details["u"] is None and details.get("unjudged"):
            yield "not judged", str(details["unjudged"])
