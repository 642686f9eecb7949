"""Each rule of the verdict on either side of its limit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdro_cli.core.scores import Interval, bootstrap_ci, paired_bootstrap
from gdro_cli.core.verdict import LIMITS, Change, Verdict, verdict

BASE = {
    "reward": 0.4,
    "u": 3.4,
    "corrected": 0.36,
    "dark_share": 0.1,
    "edge_density": 0.2,
    "colour_entropy": 4.0,
    "high_frequency": 0.1,
    "stripe_peak": 0.05,
    "diversity": 0.3,
}
RELATIVE = [name for name, signal in LIMITS.signals.items() if signal.relative]


def interval(mean: float, half: float = 0.0, *, prompts: int = 100) -> Interval:
    return Interval(mean, mean - half, mean + half, prompts, 2 * prompts, 0.95)


def change(base: float, difference: float, half: float = 0.01, *, prompts: int = 100) -> Change:
    means = ((base, 0.02), (base + difference, 0.02), (difference, half))
    return Change(*(interval(mean, width, prompts=prompts) for mean, width in means))


def judge(**differences: float | tuple[float, float]) -> Verdict:
    """The verdict where these moved, by (mean, half interval) or by mean, and all others stayed."""
    moves = {name: differences.get(name, 0.0) for name in BASE}
    pairs = {name: move if isinstance(move, tuple) else (move, 1e-6) for name, move in moves.items()}
    return verdict({name: change(BASE[name], mean, half) for name, (mean, half) in pairs.items()})


def limit(name: str, level: str) -> float:
    """The limit of a signal in its own unit."""
    signal = LIMITS.signals[name]
    return float(getattr(signal, level)) * (BASE[name] if signal.relative else 1)


def bad(name: str) -> int:
    return -1 if LIMITS.signals[name].worse == "down" else 1


def test_nothing_moved() -> None:
    result = judge()
    assert result.level == "healthy"
    assert result.reasons == (
        "Nothing moved beyond its limit: the reward +0.000 [-0.000, +0.000], quality u +0.000 [-0.000, +0.000],"
        " the corrected score +0.000 [-0.000, +0.000].",
    )


def test_a_better_model_is_healthy() -> None:
    assert judge(reward=0.3, u=0.2, corrected=0.3, diversity=0.1, dark_share=-0.1).level == "healthy"


# -- quality --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "u", "level"),
    [
        ((0.1, 0.05), (-0.11, 0.05), "suspicious"),
        ((0.1, 0.05), (-0.10, 0.05), "healthy"),  # not more than the limit
        ((0.1, 0.05), (-0.11, 0.12), "healthy"),  # u may not have fallen
        ((0.1, 0.11), (-0.11, 0.05), "healthy"),  # the reward may not have risen
        ((-0.1, 0.05), (-0.11, 0.05), "healthy"),
    ],
)
def test_the_reward_rose_while_u_fell(reward: tuple[float, float], u: tuple[float, float], level: str) -> None:
    result = judge(reward=reward, u=u)
    assert result.level == level
    if level == "suspicious":
        sentence = "The reward rose by 0.1 [0.05, 0.15] while quality u fell by 0.11 [0.06, 0.16], more than 0.1."
        assert result.reasons == (sentence,)


@pytest.mark.parametrize(("half", "level"), [(0.019, "suspicious"), (0.021, "healthy")])
def test_the_corrected_score_fell(half: float, level: str) -> None:
    result = judge(corrected=(-0.02, half))
    assert result.level == level
    assert result.reasons[0].startswith("The corrected score fell by 0.02" if level == "suspicious" else "Nothing")


@pytest.mark.parametrize(("half", "level"), [(0.09, "collapsed"), (0.11, "suspicious")])
def test_u_fell_far(half: float, level: str) -> None:
    """A fall of 0.6: the upper end is -0.51 or -0.49, the limit -0.5."""
    assert judge(reward=0.3, u=(-0.6, half)).level == level


@pytest.mark.parametrize(
    ("base", "difference", "level"),
    [
        (2.8, (-0.31, 0.1), "collapsed"),  # 2.49
        (2.8, (-0.29, 0.1), "healthy"),  # 2.51
        (2.8, (-0.31, 0.4), "healthy"),  # below the floor, but it may not have fallen
        (2.2, (0.1, 0.05), "healthy"),  # a base that is below the floor may be trained
    ],
)
def test_u_below_the_floor(base: float, difference: tuple[float, float], level: str) -> None:
    result = verdict({"u": change(base, *difference)})
    assert result.level == level
    if level == "collapsed":
        assert result.reasons[0] == "Quality u fell by 0.31 [0.21, 0.41], to 2.49, below the floor of 2.5."


# -- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIMITS.signals)
@pytest.mark.parametrize(("step", "level"), [(1.01, "suspicious"), (0.99, "healthy")])
def test_one_signal_beyond_its_limit_for_suspicion(name: str, step: float, level: str) -> None:
    result = judge(**{name: bad(name) * step * limit(name, "suspicious")})
    assert result.level == level
    if level == "suspicious":
        assert len(result.reasons) == 1
        assert result.reasons[0].startswith(name.replace("_", " ").capitalize())
        assert "more than the limit for suspicion of" in result.reasons[0]


@pytest.mark.parametrize("name", LIMITS.signals)
def test_a_change_that_may_be_chance_does_not_count(name: str) -> None:
    size = 1.5 * limit(name, "collapsed")
    assert judge(**{name: (bad(name) * size, 1.01 * size)}).level == "healthy"


@pytest.mark.parametrize("name", LIMITS.signals)
def test_directions(name: str) -> None:
    """A signal may move in its good direction; some have none."""
    result = judge(**{name: -bad(name) * 1.5 * limit(name, "suspicious")})
    assert result.level == ("suspicious" if LIMITS.signals[name].worse == "either" else "healthy")


@pytest.mark.parametrize("name", LIMITS.signals)
def test_one_far_signal_alone_is_not_a_collapse(name: str) -> None:
    result = judge(**{name: bad(name) * 1.5 * limit(name, "collapsed")})
    assert result.level == "suspicious"
    assert len(result.reasons) == 1
    assert result.reasons[0].endswith("It takes 2 such signals to call it a collapse.")


@pytest.mark.parametrize(("step", "level"), [(1.02, "collapsed"), (0.98, "suspicious")])
def test_two_far_signals(step: float, level: str) -> None:
    result = judge(dark_share=step * 0.3, edge_density=-step * 0.5 * 0.2)
    assert result.level == level
    assert len(result.reasons) == 2
    if level == "collapsed":
        assert result.reasons[1] == (
            "Edge density fell by 0.102 [0.102, 0.102] (-51 %), more than the limit for collapse of 50 %."
        )


@pytest.mark.parametrize("name", RELATIVE)
def test_relative_limits_scale_with_the_base(name: str) -> None:
    move = bad(name) * 1.2 * limit(name, "suspicious")
    assert verdict({name: change(BASE[name], move, 1e-9)}).level == "suspicious"
    assert verdict({name: change(2 * BASE[name], move, 1e-9)}).level == "healthy"


def test_a_base_of_zero() -> None:
    """Any certain change of a relative signal is beyond any share of 0; the sentence gives no share."""
    result = verdict({"high_frequency": change(0.0, 0.1, 0.01)})
    assert result.level == "suspicious"
    assert "(" not in result.reasons[0]


def test_limits_can_be_set() -> None:
    changes = {"dark_share": change(0.1, 0.2)}
    strict = replace(
        LIMITS, signals_collapsed=1, signals={"dark_share": replace(LIMITS.signals["dark_share"], collapsed=0.1)}
    )
    assert verdict(changes).level == "suspicious"
    assert verdict(changes, limits=strict).level == "collapsed"


# -- reasons --------------------------------------------------------------------------------------------------------


def test_all_findings_are_reasons_the_gravest_first() -> None:
    result = judge(reward=0.3, u=-1.0, corrected=-0.2, dark_share=0.4, stripe_peak=0.1)
    assert result.level == "collapsed"
    heads = [reason.split(" by ")[0] for reason in result.reasons]
    assert heads == [
        "Quality u fell",  # beyond 0.5
        "Quality u fell",  # to 2.4
        "Dark share rose",
        "The reward rose",
        "The corrected score fell",
        "Stripe peak rose",
    ]


def test_a_missing_measure_is_named_and_not_judged() -> None:
    result = verdict({"reward": change(0.4, 0.3), "dark_share": change(0.1, 0.0), "exact match": change(0.1, -9.0)})
    assert result.level == "healthy"
    assert result.reasons[-1] == (
        "Not measured and so not judged: quality u, the corrected score, edge density, colour entropy, high frequency,"
        " stripe peak, diversity."
    )


def test_nothing_to_judge() -> None:
    with pytest.raises(ValueError, match="needs u"):
        verdict({"reward": change(0.4, 0.3)})


@pytest.mark.parametrize(("prompts", "said"), [(10, False), (9, True)])
def test_few_prompts_are_mentioned(prompts: int, said: bool) -> None:
    result = verdict({"u": change(3.4, 0.0, prompts=prompts)})
    assert (f"Only {prompts} prompts were measured: intervals mean little." in result.reasons) is said


def test_with_the_intervals_of_real_measurements() -> None:
    """40 prompts of 2 images, quality 3.4 +- 0.3; the trained model loses 0.7 +- 0.2 while its reward rises."""
    rng = np.random.default_rng(0)
    base = rng.normal(3.4, 0.3, (40, 2))
    rewards = rng.uniform(0.2, 0.6, (40, 2))
    pairs = {"u": (base, base - rng.normal(0.7, 0.2, (40, 2))), "reward": (rewards, rewards + 0.3)}
    changes = {
        name: Change(
            bootstrap_ci(before.tolist()),
            bootstrap_ci(after.tolist()),
            paired_bootstrap(before.tolist(), after.tolist()),
        )
        for name, (before, after) in pairs.items()
    }
    assert verdict(changes).level == "collapsed"


moves = st.tuples(st.floats(-2, 2), st.floats(1e-6, 1))


@given(st.fixed_dictionaries({}, optional={name: moves for name in BASE}))
def test_for_any_changes(differences: dict[str, tuple[float, float]]) -> None:
    """There is always a sentence, all are sentences, and a level above healthy never says that nothing moved."""
    if not differences.keys() - {"reward"}:
        return
    result = verdict({name: change(BASE[name], *move) for name, move in differences.items()})
    assert all(reason[0].isupper() and reason.endswith(".") for reason in result.reasons)
    assert result.reasons[0].startswith("Nothing moved") is (result.level == "healthy")


# -- the page -------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[2] / "docs/metrics.md").read_text(encoding="utf-8")


def test_the_page_shows_the_limits_that_are_used() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (up|down|either) \| ([\d.]+)( %)? \| ([\d.]+)( %)? \|$", PAGE, flags=re.MULTILINE
    )
    shown = {
        name: (worse, bool(percent), float(near) / (100 if percent else 1), float(far) / (100 if percent else 1))
        for name, worse, near, percent, far, _ in rows
    }
    used = {name: (s.worse, s.relative, s.suspicious, s.collapsed) for name, s in LIMITS.signals.items()}
    assert shown == used
    for name in ("u_fall_suspicious", "u_fall_collapsed", "u_floor", "signals_collapsed", "few_prompts"):
        assert f"| `{name}` | {getattr(LIMITS, name):g} |" in PAGE
