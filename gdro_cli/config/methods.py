"""The training methods: one class each, told apart by ``method.name``.

Methods on stored groups learn offline. Their symbols and equations are those of the GDRO paper (arXiv 2601.02036): K
images per group, tau the temperature of the target distribution (eqs. 7, 17), beta the strength of the implicit reward
(eq. 3), gamma the weight of the top-1 likelihood (eqs. 8-9). Online methods make their images while they train:
Flow-GRPO (arXiv 2505.05470) and DanceGRPO (arXiv 2505.07818). A new method is one class here and one entry in
``Method``.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field

from gdro_cli.config.base import FallsBackTo, StrictModel

NoiseLevels = Annotated[
    tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(gt=0, le=1)]], Field(strict=False)
]
"""The lowest and the highest noise level that is trained."""


class AnyMethod(StrictModel):
    """The key that every method has."""

    title: ClassVar[str]
    """What model cards call the method, with its paper."""
    name: str
    """The method that trains."""


class GroupMethod(AnyMethod):
    """The keys that all methods on stored groups share."""

    loss_settings: ClassVar[tuple[str, ...]] = ()
    """The keys that the method's loss (``core.losses.LOSSES``) takes; beta and gamma come with every loss."""

    needs_order: ClassVar[bool] = True
    """Whether the method learns nothing from images of equal reward."""

    k: int = Field(6, ge=2)
    """Images drawn from a stored group per visit (K). At least 2, at most `sample.images_per_prompt`.
    Paper: 6; 2 is unstable."""
    k_policy: Literal["drop", "whole"] = "drop"
    """What becomes of a group with fewer than `k` scored images, such as an imported one. `drop`: it is left out;
    `whole`: all its scored images are drawn, so `k` is the most. A step computes places for `k` images in any group, so
    a `k` far above most groups costs time."""
    beta: float = Field(12.0, gt=0)
    """Strength of the implicit reward s = -beta (e - e_ref), beta = T * beta_KL (eq. 3), for the `reduction` below.
    Above 0. Paper: 12 for OCR, 6 for GenEval; if it is too low, the images collapse. Of `sft` and `nft` it changes the
    diagnostics alone. Public DPO code (Diffusion-DPO, flow_grpo, diffusers) has -beta / 2 in the sigmoid: a beta from
    there is twice as strong here, so halve it."""
    gamma: float = Field(0.5, ge=0)
    """Weight of the velocity error of the group's best image (eqs. 8-9), which keeps its likelihood high. 0 or more.
    Paper: 0.5 for OCR, 1 for GenEval; at 0 the images collapse."""
    reduction: Literal["mean", "sum"] = "mean"
    """How a velocity error is reduced over the latent's dimensions. `sum` multiplies it by their number, so beta must
    shrink by the same factor."""
    share_noise: bool = True
    """`true`: one noise for all images of a group (lower variance of the differences); `false`: one for each image."""
    share_sigma: bool = True
    """`true`: one noise level for all images of a group; `false`: one for each image."""
    noise_bank: int | None = Field(None, ge=1)
    """Draws of noise and noise level per prompt (per image if they are not shared). They are reused at every visit, so
    the reference's errors are computed only once (`train.cache_reference`). 1 or more. Unset: a new draw at every
    visit."""
    sigma_min: float = Field(0.0, ge=0, lt=1)
    """Lowest noise level trained, 0 = clean. In [0, 1), below `sigma_max`."""
    sigma_max: float = Field(1.0, gt=0, le=1)
    """Highest noise level trained, 1 = pure noise. In (0, 1], above `sigma_min`."""
    sigma_by_round: Annotated[tuple[NoiseLevels, ...] | None, Field(strict=False)] = None
    """Noise levels [lowest, highest] of each of the `train.rounds`, in place of `sigma_min` and `sigma_max`. Unset: all
    rounds train those two."""
    min_spread: float = Field(0.0, ge=0)
    """A group whose highest and lowest reward differ by no more than this carries no preference and is left out. In
    units of the reward, 0 or more."""

    def of_round(self, number: int) -> Self:
        """The method with the noise levels of round ``number`` (from 0) as its own."""
        if self.sigma_by_round is None:
            return self
        lowest, highest = self.sigma_by_round[number]
        return self.model_copy(update={"sigma_min": lowest, "sigma_max": highest})


class GdroMethod(GroupMethod):
    """Group-level Direct Reward Optimization (eqs. 7-9): the group's order, weighted by its rewards."""

    title: ClassVar[str] = "GDRO (Group-level Direct Reward Optimization, arXiv 2601.02036)"
    loss_settings: ClassVar[tuple[str, ...]] = ("tau",)
    name: Literal["gdro"]
    tau: float = Field(0.05, ge=0)
    """Temperature of the target distribution softmax(r / tau), in units of the reward. 0 or more; 0 is the exact limit
    (one-hot on the best remaining image), not a small number. Paper: 0.05; 0.5 is too weak, 0.025 is unstable."""


class RankMethod(GroupMethod):
    """Plackett-Luce likelihood of the order alone (eq. 12): the size of the rewards does not matter."""

    title: ClassVar[str] = "the rank loss of the GDRO paper (arXiv 2601.02036)"
    name: Literal["rank"]


class Top1Method(GroupMethod):
    """Only the first term of GDRO (eq. 6): the best image against the whole group."""

    title: ClassVar[str] = "the top-1 loss of the GDRO paper (arXiv 2601.02036)"
    loss_settings: ClassVar[tuple[str, ...]] = ("tau",)
    name: Literal["top1"]
    tau: float = Field(0.05, ge=0)
    """Temperature of the target distribution softmax(r / tau), in units of the reward. 0 or more; 0 is one-hot on the
    best."""


class DpoMethod(GroupMethod):
    """Diffusion-DPO on pairs from the group (eqs. 18-19): -log sigmoid(s_better - s_worse)."""

    title: ClassVar[str] = "DPO on the best and worst images of each group (arXiv 2311.12908)"
    loss_settings: ClassVar[tuple[str, ...]] = ("pairs",)
    name: Literal["dpo"]
    pairs: Literal["best_worst", "all"] = "best_worst"
    """`best_worst`: one pair per group, the highest against the lowest reward. `all`: every pair of different
    rewards."""


class SftMethod(GroupMethod):
    """Supervised fine-tuning: the velocity errors of a group's images, weighted by softmax(r / tau). No reference."""

    title: ClassVar[str] = "supervised fine-tuning on the best images of each group"
    loss_settings: ClassVar[tuple[str, ...]] = ("tau",)
    needs_order: ClassVar[bool] = False
    name: Literal["sft"]
    k: int = Field(1, ge=1)
    """Images drawn from a stored group per visit (K). At least 1 (demonstrations: one image each), at most
    `sample.images_per_prompt`."""
    tau: float = Field(0.0, ge=0)
    """Temperature of the weights softmax(r / tau), in units of the reward. 0 or more; 0 trains on the best image
    alone."""
    beta: float = Field(12.0, gt=0)
    """Strength of the implicit reward in the diagnostics; it changes nothing in the training. Above 0."""
    gamma: float = Field(0.0, ge=0)
    """More weight for the best image alone. 0 or more."""


class RegressionMethod(GroupMethod):
    """Regression of the implicit rewards onto targets made of the group's rewards (Diffusion LAIR, CRD)."""

    title: ClassVar[str] = "regression on rewards (Diffusion LAIR, arXiv 2605.26491, or CRD, arXiv 2603.14128)"
    loss_settings: ClassVar[tuple[str, ...]] = ("target", "tau", "penalty")
    name: Literal["regression"]
    target: Literal["lair", "crd"] = "lair"
    """What the implicit rewards s of a group should become, times `penalty`. `lair`: softmax(r / tau) minus its mean.
    `crd`: the advantages (r - mean r) / std r, up to a constant; `tau` changes the diagnostics alone."""
    tau: float = Field(0.05, ge=0)
    """Temperature of softmax(r / tau), in units of the reward. 0 or more."""
    penalty: float = Field(1.0, gt=0)
    """Weight lambda of the squared implicit rewards, which bounds them: the higher, the nearer the optimum is to the
    reference. Above 0."""
    gamma: float = Field(0.0, ge=0)


class DgpoMethod(GroupMethod):
    """DGPO: DPO on the whole group, -log sigmoid of the mean of A s with A = (r - mean) / std of the group."""

    title: ClassVar[str] = "DGPO (Direct Group Preference Optimization, arXiv 2510.08425)"
    name: Literal["dgpo"]
    gamma: float = Field(0.0, ge=0)


class NftMethod(GroupMethod):
    """DiffusionNFT on stored groups: towards the good images of a group, and away from the bad ones."""

    title: ClassVar[str] = "DiffusionNFT on stored groups (arXiv 2509.16117)"
    loss_settings: ClassVar[tuple[str, ...]] = ("mixing", "advantage_clip")
    name: Literal["nft"]
    mixing: float = Field(1.0, gt=0)
    """Share b of the trained velocity in the mixture that fits good images, v+ = (1 - b) v_ref + b v; v- = (1 + b)
    v_ref - b v fits the bad ones. Above 0. The lower, the further the optimum is from the reference (guidance strength
    1 / b; the paper calls b beta). Public code: 1 for GenEval, 0.1 for OCR."""
    advantage_clip: float = Field(5.0, gt=0)
    """Largest advantage (r - mean) / std; for `nft` the one at which an image counts as wholly good, and its negative
    as wholly bad. Above 0. Flow-GRPO, DanceGRPO and DiffusionNFT: 5."""
    gamma: float = Field(0.0, ge=0)


class OnlineMethod(AnyMethod):
    """The keys that the online methods share. Each round samples with the policy, scores the images and updates it.

    The defaults are the public code's settings for OCR and GenEval on SD3.5-M (Flow-GRPO) and for FLUX (DanceGRPO);
    docs/baselines.md has the table.
    """

    group_size: int = Field(24, ge=2)
    """Images of each prompt in a round. 2 or more. Flow-GRPO: 24; DanceGRPO: 12."""
    prompts_per_round: int = Field(48, ge=1)
    """Prompts in a round, over all processes together. 1 or more. Flow-GRPO: 48; DanceGRPO: 16, one per GPU."""
    updates_per_round: int = Field(2, ge=1)
    """Equal parts into which a round's images are split, with one optimizer step each. 1 or more. Flow-GRPO: 2;
    DanceGRPO: 3, of 4 images per GPU."""
    inner_epochs: int = Field(1, ge=1)
    """Passes over the images of a round. 1 or more. A round has `inner_epochs` * `updates_per_round` optimizer steps.
    Flow-GRPO and DanceGRPO: 1."""
    train_sample_steps: int = Field(10, ge=2)
    """Sampling steps in the rounds, few to save time; evaluations have a number of their own. 2 or more. The last step
    has no noise and is not trained. Flow-GRPO: 10 on SD3.5, 6 on FLUX; DanceGRPO: 16."""
    timestep_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the steps with noise that are trained, drawn for each image; rounded down, but at least one step. In
    (0, 1]. Flow-GRPO: all; DanceGRPO: 0.6."""
    share_initial_noise: bool = False
    """`true`: one initial noise for all images of a group, which then differ only by the noise of the steps. Flow-GRPO:
    false; DanceGRPO: true."""
    guidance: Annotated[float | None, FallsBackTo("sample.guidance")] = Field(None, ge=0)
    """Guidance scale of the rounds and updates, 0 or more. Unset: `sample.guidance`."""
    clip_range: float = Field(1e-4, gt=0)
    """Half the width of the range that likelihood ratios are clipped to. Above 0. Flow-GRPO and DanceGRPO: 1e-4, for
    log-likelihoods that are means over the latent's dimensions."""
    beta_kl: float = Field(0.04, ge=0)
    """Weight of the divergence from the reference; 0 saves the reference's forward passes. 0 or more. Flow-GRPO: 0.04
    on SD3.5 (OCR, GenEval), 0 on FLUX; DanceGRPO: 0."""
    advantage_std: Literal["global", "group"] = "global"
    """The standard deviation by which a group's rewards are divided: that of the whole round (`global`) or of the group
    (`group`). Flow-GRPO: global; DanceGRPO: group."""
    advantage_clip: float = Field(5.0, gt=0)
    """Largest advantage. Above 0. Flow-GRPO and DanceGRPO: 5."""

    @property
    def steps_per_round(self) -> int:
        """Optimizer steps of a round."""
        return self.updates_per_round * self.inner_epochs

    @property
    def trained_sample_steps(self) -> int:
        """The number of trained steps among an image's ``train_sample_steps - 1`` stochastic sampling steps."""
        return max(1, math.floor(self.timestep_fraction * (self.train_sample_steps - 1) + 1e-9))  # 0.6 * 5 is 3


class FlowGrpoMethod(OnlineMethod):
    """Flow-GRPO (arXiv 2505.05470): policy gradient on an SDE with more noise at high noise levels."""

    title: ClassVar[str] = "Flow-GRPO (arXiv 2505.05470)"
    name: Literal["flow-grpo"]
    noise_level: float = Field(0.7, gt=0)
    """Strength a of the sampler's noise a * sqrt(sigma / (1 - sigma)). Above 0. Published: 0.7 on SD3.5, 0.9 on
    FLUX."""


class DanceGrpoMethod(OnlineMethod):
    """DanceGRPO (arXiv 2505.07818): policy gradient on an SDE with constant noise, from one initial noise per group."""

    title: ClassVar[str] = "DanceGRPO (arXiv 2505.07818)"
    name: Literal["dance-grpo"]
    eta: float = Field(0.3, gt=0)
    """Strength of the sampler's noise at every noise level. Above 0. Published: 0.3 on FLUX."""
    # Published settings of the shared keys.
    group_size: int = Field(12, ge=2)
    prompts_per_round: int = Field(16, ge=1)
    updates_per_round: int = Field(3, ge=1)
    train_sample_steps: int = Field(16, ge=2)
    timestep_fraction: float = Field(0.6, gt=0, le=1)
    share_initial_noise: bool = True
    beta_kl: float = Field(0.0, ge=0)
    advantage_std: Literal["global", "group"] = "group"


Method = Annotated[
    GdroMethod
    | RankMethod
    | Top1Method
    | DpoMethod
    | SftMethod
    | RegressionMethod
    | DgpoMethod
    | NftMethod
    | FlowGrpoMethod
    | DanceGrpoMethod,
    Field(discriminator="name"),
]

#: The methods by the value of ``method.name``.
METHODS: dict[str, type[AnyMethod]] = {
    get_args(model.model_fields["name"].annotation)[0]: model for model in get_args(get_args(Method)[0])
}
