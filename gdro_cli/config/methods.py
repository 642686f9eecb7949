"""The training methods: one class each, told apart by ``method.name``.

Symbols and equations are those of the GDRO paper (arXiv 2601.02036): K images per group, tau the temperature
of the target distribution (eqs. 7, 17), beta the strength of the implicit reward (eq. 3), gamma the weight of
the top-1 likelihood (eqs. 8-9). A new method is one class here, one entry in ``Method`` and one in ``METHODS``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gdro_cli.config.base import StrictModel


class GroupMethod(StrictModel):
    """What every method that trains on stored groups shares."""

    name: str
    """Which method trains."""
    k: int = Field(6, ge=2)
    """Images drawn from a stored group per visit (K). At least 2, at most `sample.images_per_prompt`.
    Paper: 6; 2 is unstable."""
    beta: float = Field(12.0, gt=0)
    """Strength of the implicit reward, beta = T * beta_KL (eq. 3), for the reduction named below. Above 0.
    Paper: 12 for OCR, 6 for GenEval; too low and the images collapse."""
    gamma: float = Field(0.5, ge=0)
    """Weight of the velocity error of the group's best image (eqs. 8-9), which holds its likelihood up. 0 or
    more. Paper: 0.5 for OCR, 1 for GenEval; 0 collapses."""
    reduction: Literal["mean", "sum"] = "mean"
    """How a velocity error is taken over the latent's dimensions. `sum` multiplies it by their number, so
    beta must shrink by as much."""
    share_noise: bool = True
    """One noise for all images of a group (lower variance of the differences), or one for each image."""
    share_sigma: bool = True
    """One noise level for all images of a group, or one for each image."""
    sigma_min: float = Field(0.0, ge=0, lt=1)
    """Lowest noise level trained, 0 = clean. In [0, 1), below `sigma_max`."""
    sigma_max: float = Field(1.0, gt=0, le=1)
    """Highest noise level trained, 1 = pure noise. In (0, 1], above `sigma_min`."""
    min_spread: float = Field(0.0, ge=0)
    """Groups whose highest and lowest reward differ by no more than this carry no preference and are left
    out. In units of the reward, 0 or more."""


class GdroMethod(GroupMethod):
    """Group-level Direct Reward Optimization (eqs. 7-9): the group's order, weighted by its rewards."""

    name: Literal["gdro"]
    """`gdro`."""
    tau: float = Field(0.05, ge=0)
    """Temperature of the target distribution softmax(r / tau), in units of the reward. 0 is the exact limit
    (one-hot on the best remaining image), not a small number. Paper: 0.05; 0.5 is too weak, 0.025 is
    unstable."""


class RankMethod(GroupMethod):
    """Plackett-Luce likelihood of the order alone (eq. 12): how large the rewards are does not matter."""

    name: Literal["rank"]
    """`rank`."""


class Top1Method(GroupMethod):
    """Only the first term of GDRO (eq. 6): the best image against the whole group."""

    name: Literal["top1"]
    """`top1`."""
    tau: float = Field(0.05, ge=0)
    """Temperature of the target distribution softmax(r / tau), in units of the reward. 0 is one-hot on the
    best."""


class DpoMethod(GroupMethod):
    """Diffusion-DPO on pairs from the group (eqs. 18-19): -log sigmoid(s_better - s_worse)."""

    name: Literal["dpo"]
    """`dpo`."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """`best_worst`: one pair per group, the highest against the lowest reward. `all`: every pair whose
    rewards differ."""


Method = Annotated[GdroMethod | RankMethod | Top1Method | DpoMethod, Field(discriminator="name")]

#: The methods by the value of ``method.name``.
METHODS: dict[str, type[GroupMethod]] = {
    "gdro": GdroMethod,
    "rank": RankMethod,
    "top1": Top1Method,
    "dpo": DpoMethod,
}
