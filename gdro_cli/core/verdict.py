"""From differences between two models to a verdict in plain language: was the reward hacked?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gdro_cli.core.scores import Interval

Level = Literal["healthy", "suspicious", "collapsed"]
Direction = Literal["up", "down", "either"]


@dataclass(frozen=True, slots=True)
class Change:
    """A quantity of the base model, and how training changed it on the same prompts and noise."""

    base: Interval
    trained: Interval
    difference: Interval
    """The paired difference trained - base, over the images that have the quantity on both sides."""

    @property
    def rose(self) -> bool:
        """Whether the whole interval of the difference is above 0."""
        return self.difference.low > 0

    @property
    def fell(self) -> bool:
        """Whether the whole interval of the difference is below 0."""
        return self.difference.high < 0


@dataclass(frozen=True, slots=True)
class SignalLimits:
    """How far an image signal may move. A change of exactly the limit is still allowed."""

    suspicious: float
    collapsed: float
    relative: bool = False
    """Limits are shares of the base model's mean, not differences in the signal's own unit."""
    worse: Direction = "either"
    """The direction that counts against the model."""


@dataclass(frozen=True, slots=True)
class Limits:
    """All limits of the verdict. They are this project's settings; none comes from the paper."""

    u_fall_suspicious: float = 0.1
    """Points of u that may be lost while the reward rises."""
    u_fall_collapsed: float = 0.5
    """Points of u; collapsed when the whole interval of the fall is beyond."""
    u_floor: float = 2.5
    """Collapsed when u fell and its mean is below."""
    signals_collapsed: int = 2
    """How many signals beyond their limit for collapse make one. A single one may be a change of style."""
    few_prompts: int = 10
    """With fewer prompts the verdict says that intervals over prompts mean little."""
    signals: Mapping[str, SignalLimits] = field(
        default_factory=lambda: {
            "dark_share": SignalLimits(0.15, 0.3, worse="up"),
            "edge_density": SignalLimits(0.25, 0.5, relative=True),
            "colour_entropy": SignalLimits(0.2, 0.4, relative=True),
            "high_frequency": SignalLimits(0.4, 0.7, relative=True),
            "stripe_peak": SignalLimits(0.05, 0.15, worse="up"),
            "diversity": SignalLimits(0.25, 0.5, relative=True, worse="down"),
        }
    )
    """By the names of ``core.signals``."""


LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to think of a trained model beside its reward.

    Attributes:
        level: the worst level with a reason.
        reasons: plain sentences with numbers, the gravest first; at least one.
    """

    level: Level
    reasons: tuple[str, ...]


def verdict(changes: Mapping[str, Change], *, limits: Limits = LIMITS) -> Verdict:
    """Judge a trained model by how it differs from its base.

    **Collapsed** when one of these holds:

    - u fell, and the whole interval of its difference is below -``u_fall_collapsed``;
    - u fell (interval below 0) and its trained mean is below ``u_floor``;
    - at least ``signals_collapsed`` image signals moved in their bad direction by more than their limit for collapse,
      each with an interval that excludes 0.

    **Suspicious** when not collapsed and one of these holds:

    - the reward rose (interval above 0) while u fell (interval below 0) by more than ``u_fall_suspicious``;
    - the corrected score fell (interval below 0);
    - at least one image signal moved in its bad direction by more than its limit for suspicion, with an interval that
      excludes 0.

    **Healthy** otherwise. A quantity that was not measured is not judged, and a reason says so.

    Args:
        changes: by name: "reward", "u", "corrected" and the signals of ``limits``; other names are ignored.
        limits: the limits of each rule.

    Raises:
        ValueError: neither u, the corrected score nor any signal was measured, so nothing can be said.
    """
    judged = ("reward", "u", "corrected", *limits.signals)
    measured = {name: changes[name] for name in judged if name in changes}
    if not measured.keys() - {"reward"}:
        raise ValueError("a verdict needs u, the corrected score or an image signal")
    far, near = (_signal_findings(measured, limits, level) for level in ("collapsed", "suspicious"))
    findings = _collapsed_quality(measured.get("u"), limits)
    collapsed = bool(findings) or len(far) >= limits.signals_collapsed
    findings += far.values()
    if far and len(far) < limits.signals_collapsed:
        findings[-1] += f" It takes {limits.signals_collapsed} such signals to call it a collapse."
    findings += _suspicious_quality(measured, limits)
    findings += [sentence for name, sentence in near.items() if name not in far]
    level: Level = "collapsed" if collapsed else "suspicious" if findings else "healthy"
    reasons = [*(findings or [_healthy_sentence(measured)]), *_caveats(measured, judged, limits)]
    return Verdict(level, tuple(reason[0].upper() + reason[1:] for reason in reasons))


def _collapsed_quality(u: Change | None, limits: Limits) -> list[str]:
    if u is None:
        return []
    reasons = []
    if u.difference.high < -limits.u_fall_collapsed:
        reasons.append(f"{_moved_by('u', u)}: all of the interval is beyond a fall of {limits.u_fall_collapsed:g}.")
    if u.fell and u.trained.mean < limits.u_floor:
        reasons.append(f"{_moved_by('u', u)}, to {u.trained.mean:.2f}, below the floor of {limits.u_floor:g}.")
    return reasons


def _suspicious_quality(measured: Mapping[str, Change], limits: Limits) -> list[str]:
    reward, u, corrected = (measured.get(name) for name in ("reward", "u", "corrected"))
    reasons = []
    if reward and reward.rose and u and u.fell and -u.difference.mean > limits.u_fall_suspicious:
        reasons.append(
            f"{_moved_by('reward', reward)} while {_moved_by('u', u)}, more than {limits.u_fall_suspicious:g}."
        )
    if corrected and corrected.fell:
        reasons.append(f"{_moved_by('corrected', corrected)}.")
    return reasons


def _signal_findings(measured: Mapping[str, Change], limits: Limits, level: str) -> dict[str, str]:
    """A sentence for each signal that moved in its bad direction beyond its limit, with an interval that excludes 0."""
    findings = {}
    for name, signal in limits.signals.items():
        change, limit = measured.get(name), signal.collapsed if level == "collapsed" else signal.suspicious
        if change is None or not _moved(
            change, signal.worse, limit * (abs(change.base.mean) if signal.relative else 1)
        ):
            continue
        shown = f"{100 * limit:g} %" if signal.relative else f"{limit:g}"
        share = change.difference.mean / abs(change.base.mean) if signal.relative and change.base.mean else None
        size = "" if share is None else f" ({100 * share:+.0f} %)"
        purpose = "for collapse" if level == "collapsed" else "for suspicion"
        findings[name] = f"{_moved_by(name, change)}{size}, more than the limit {purpose} of {shown}."
    return findings


def _moved(change: Change, worse: Direction, limit: float) -> bool:
    up = change.rose and change.difference.mean > limit
    down = change.fell and -change.difference.mean > limit
    return (up and worse != "down") or (down and worse != "up")


_LABELS = {"reward": "the reward", "u": "quality u", "corrected": "the corrected score"}


def _label(name: str) -> str:
    return _LABELS.get(name, name.replace("_", " "))


def _moved_by(name: str, change: Change) -> str:
    """For example ``dark share rose by 0.21 [0.18, 0.24]``; the interval is that of the rise or of the fall."""
    d = change.difference
    if d.mean < 0:
        return f"{_label(name)} fell by {-d.mean:.3g} [{-d.high:.3g}, {-d.low:.3g}]"
    return f"{_label(name)} rose by {d.mean:.3g} [{d.low:.3g}, {d.high:.3g}]"


def _healthy_sentence(measured: Mapping[str, Change]) -> str:
    facts = [
        f"{_label(name)} {c.difference.mean:+.3f} [{c.difference.low:+.3f}, {c.difference.high:+.3f}]"
        for name, c in measured.items()
        if name in _LABELS
    ]
    return f"Nothing moved beyond its limit{': ' + ', '.join(facts) if facts else ''}."


def _caveats(measured: Mapping[str, Change], judged: tuple[str, ...], limits: Limits) -> list[str]:
    missing = [_label(name) for name in judged if name not in measured]
    prompts = min(change.difference.prompts for change in measured.values())
    notes = [f"Not measured and so not judged: {', '.join(missing)}."] if missing else []
    if prompts < limits.few_prompts:
        were = "prompt was" if prompts == 1 else "prompts were"
        notes.append(f"Only {prompts} {were} measured: intervals mean little.")
    return notes
