"""The metrics beside the loss, worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gdro_cli.core.diagnostics import group_metrics


def metrics(s: list[float], r: list[float], *, tau: float = 0.05, **errors: list[float]) -> dict[str, float]:
    zeros = torch.zeros(1, len(s))
    e = torch.tensor([errors["e"]]) if "e" in errors else zeros
    e_ref = torch.tensor([errors["e_ref"]]) if "e_ref" in errors else zeros
    tensors = group_metrics(torch.tensor([s]), e, e_ref, torch.tensor([r]), tau=tau)
    return {name: value.item() for name, value in tensors.items()}


def test_implicit_accuracy_by_hand() -> None:
    """r = (3, 2, 2, 1) has five pairs: (0,1) is wrong, (0,2), (0,3), (1,3) are right, (2,3) counts half."""
    assert metrics([4.0, 5.0, 1.0, 1.0], [3.0, 2.0, 2.0, 1.0])["implicit_accuracy"] == pytest.approx(3.5 / 5)


def test_implicit_accuracy_limits() -> None:
    r = [0.1, 0.9, 0.5]
    assert metrics(r, r)["implicit_accuracy"] == 1.0
    assert metrics([-x for x in r], r)["implicit_accuracy"] == 0.0
    assert metrics([0.0] * 3, r)["implicit_accuracy"] == 0.5
    assert math.isnan(metrics([1.0, 2.0, 3.0], [0.5] * 3)["implicit_accuracy"])


def test_s_per_rank() -> None:
    values = metrics([7.0, 8.0, 9.0], [0.5, 0.1, 0.9])
    assert [values[f"s_rank_{rank}"] for rank in (1, 2, 3)] == [9.0, 7.0, 8.0]


def test_error_gaps_of_best_and_worst() -> None:
    """Best image: 0.5 - 1.0 = -0.5; the two worst share: ((3 - 1) + (2 - 1)) / 2 = 1.5."""
    values = metrics([0.0] * 3, [0.0, 1.0, 0.0], e=[3.0, 0.5, 2.0], e_ref=[1.0] * 3)
    assert values["top1_error_gap"] == -0.5
    assert values["bottom1_error_gap"] == 1.5


def test_entropies_by_hand() -> None:
    """P with weights 1 : 1 has ln 2; Q at tau = 1 with weights 3 : 1 has ln 4 - 3/4 ln 3, at tau = 0 none."""
    r = [math.log(3), 0.0]
    values = metrics([5.0, 5.0], r, tau=1.0)
    assert values["entropy_p"] == pytest.approx(math.log(2))
    assert values["entropy_q"] == pytest.approx(math.log(4) - 0.75 * math.log(3))
    assert metrics([5.0, 5.0], r, tau=0.0)["entropy_q"] == 0.0


def test_means_run_over_scored_groups_only() -> None:
    """Group 2 has one scored image, group 3 none: rank 1 averages groups 1 and 2, rank 2 is group 1 alone."""
    s = torch.tensor([[1.0, 2.0], [5.0, torch.nan], [torch.nan, torch.nan]])
    r = torch.tensor([[0.0, 1.0], [1.0, torch.nan], [torch.nan, torch.nan]])
    values = group_metrics(s, s, torch.zeros_like(s), r, ~r.isnan(), tau=0.05)
    assert values["s_rank_1"].item() == (2.0 + 5.0) / 2
    assert values["s_rank_2"].item() == 1.0
    assert values["top1_error_gap"].item() == (2.0 + 5.0) / 2
    assert values["bottom1_error_gap"].item() == (1.0 + 5.0) / 2
    assert values["implicit_accuracy"].item() == 1.0


def test_metrics_are_detached_scalars() -> None:
    s, e, e_ref, r = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    for value in group_metrics(s, e, e_ref, r, tau=0.05).values():
        assert value.shape == ()
        assert not value.requires_grad


def test_wrong_shapes() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="one shape"):
        group_metrics(x, x, x[:, :2], x, tau=0.0)
