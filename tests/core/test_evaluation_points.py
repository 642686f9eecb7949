"""Which evaluation points may be compared."""

from __future__ import annotations

import pytest

from gdro_cli.core.evaluation_points import MissingLimits


@pytest.mark.parametrize(
    ("failed", "unjudged", "allowed"),
    [(0, 0, True), (2, 0, True), (3, 0, False), (0, 5, True), (0, 6, False), (2, 5, True), (10, 0, False)],
)
def test_a_point_is_allowed_up_to_exactly_each_limit(failed: int, unjudged: int, allowed: bool) -> None:
    """Of ten images two may lack a reward, and five may lack u."""
    point = {"step": 2, "images": 10 - failed, "failed": failed, "unjudged": unjudged}
    assert MissingLimits(reward=0.2, judgement=0.5).allow(point) is allowed


def test_without_a_judge_nothing_is_unjudged() -> None:
    assert MissingLimits(0.0, 0.0).allow({"step": 2, "images": 4, "failed": 0})
