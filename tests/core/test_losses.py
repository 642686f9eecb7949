"""Group losses against hand-worked values, a literal transcription of the equations, and their limits."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Literal

import pytest
import torch
from torch import Tensor

from gdro_cli.core.loss_output import LossOutput
from gdro_cli.core.losses import dpo_loss, gdro_loss, group_loss, image_weights, rank_loss, top1_loss, top1_stabiliser
from gdro_cli.core.other_losses import dgpo_loss, nft_loss, regression_loss, sft_loss

LN2, LN3, LN5, LN6 = math.log(2), math.log(3), math.log(5), math.log(6)

# The worked group, stored worst image first. Sorted by reward it is r = (ln 3, ln 2, 0), s = (0, ln 2, ln 3):
# the weights exp(r) are 3 : 2 : 1 and exp(s) are 1 : 2 : 3.
REWARDS = torch.tensor([[0.0, LN3, LN2]], dtype=torch.float64)
S = torch.tensor([[LN3, 0.0, LN2]], dtype=torch.float64)

Loss = Callable[..., LossOutput]
LOSSES: dict[str, Loss] = {
    "gdro": lambda s, r, mask=None: gdro_loss(s, r, tau=0.3, mask=mask),
    "gdro tau 0": lambda s, r, mask=None: gdro_loss(s, r, tau=0.0, mask=mask),
    "rank": rank_loss,
    "top1": lambda s, r, mask=None: top1_loss(s, r, tau=0.3, mask=mask),
    "top1 tau 0": lambda s, r, mask=None: top1_loss(s, r, tau=0.0, mask=mask),
    "dpo": dpo_loss,
    "dpo all pairs": lambda s, r, mask=None: dpo_loss(s, r, pairs="all", mask=mask),
    "lair": lambda s, r, mask=None: regression_loss(s, r, target="lair", tau=0.3, penalty=0.7, mask=mask),
    "crd": lambda s, r, mask=None: regression_loss(s, r, target="crd", tau=0.3, penalty=0.7, mask=mask),
    "dgpo": dgpo_loss,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def literal(name: str, s: list[float], r: list[float]) -> float:
    """One group's loss by plain loops over the paper's sums; the caller leaves out unscored images.

    With ties, the partitions and the expected s of a rank are means over all orders of tied images.
    """
    size = len(r)
    if name.startswith("dpo"):
        if name == "dpo":
            best = [i for i in range(size) if r[i] == max(r)]
            worst = [i for i in range(size) if r[i] == min(r)]
            pairs = [(i, j) for i in best for j in worst if r[i] > r[j]]
        else:
            pairs = [(i, j) for i in range(size) for j in range(size) if r[i] > r[j]]
        return sum(math.log1p(math.exp(s[j] - s[i])) for i, j in pairs) / max(1, len(pairs))
    if name in ("lair", "crd", "dgpo"):
        if size < 2:
            return 0.0
        weights = [math.exp(x / 0.3) for x in r]
        share = [x / sum(weights) - 1 / size for x in weights]
        mean, middle = statistics.fmean(r), statistics.fmean(s)
        advantage = [(x - mean) / statistics.pstdev(r) if max(r) > min(r) else 0.0 for x in r]
        if name == "lair":
            return sum(0.7 / 2 * y * y - a * y for a, y in zip(share, s, strict=True))
        if name == "crd":
            return sum((y - middle - a / 0.7) ** 2 for a, y in zip(advantage, s, strict=True)) / size
        margin = sum(a * y for a, y in zip(advantage, s, strict=True)) / size
        return math.log1p(math.exp(-margin)) if max(r) > min(r) else 0.0
    orders = [p for p in itertools.permutations(range(size)) if all(r[i] >= r[j] for i, j in itertools.pairwise(p))]
    total = 0.0
    for rank in range(size - 1 if not name.startswith("top1") else min(1, size - 1)):
        partitions, expectations = [], []
        for order in orders:
            left = order[rank:]
            if name == "rank":
                q = {j: float(j == left[0]) for j in left}
            elif name.endswith("tau 0"):
                ties = [j for j in left if r[j] == r[left[0]]]
                q = {j: (j in ties) / len(ties) for j in left}
            else:
                scale = sum(math.exp((r[j] - r[left[0]]) / 0.3) for j in left)
                q = {j: math.exp((r[j] - r[left[0]]) / 0.3) / scale for j in left}
            partitions.append(sum(math.exp(s[m]) for m in left))
            expectations.append(sum(q[j] * s[j] for j in left))
        total += math.log(statistics.fmean(partitions)) - statistics.fmean(expectations)
    return total


def random_groups(*, groups: int, images: int, seed: int, ties: bool) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(seed)
    s = torch.randn(groups, images, generator=stream, dtype=torch.float64)
    r = torch.rand(groups, images, generator=stream, dtype=torch.float64)
    return s, (r * 3).round() / 3 if ties else r


def gradient(loss: Loss, s: Tensor, r: Tensor, mask: Tensor | None = None) -> Tensor:
    leaf = s.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(loss(leaf, r, mask=mask).loss, leaf)
    return grad


def test_gdro_by_hand() -> None:
    """q_1 = (1/2, 1/3, 1/6), q_2 = (2/3, 1/3); the partition sums are 6 and 5.

    L = ln 6 - (ln 2 / 3 + ln 3 / 6) + ln 5 - (2 ln 2 / 3 + ln 3 / 3) = ln 30 - ln 2 - ln 3 / 2.
    dL/ds = p - q with p_1 = (1/6, 1/3, 1/2), p_2 = (2/5, 3/5): (-1/3, -4/15, 3/5).
    """
    out = gdro_loss(S, REWARDS, tau=1.0)
    assert out.loss.item() == pytest.approx(math.log(30) - LN2 - LN3 / 2, abs=1e-12)
    grad = gradient(lambda s, r, mask=None: gdro_loss(s, r, tau=1.0, mask=mask), S, REWARDS)
    torch.testing.assert_close(grad, torch.tensor([[3 / 5, -1 / 3, -4 / 15]], dtype=torch.float64))


def test_gdro_temperature_divides_the_rewards() -> None:
    torch.testing.assert_close(gdro_loss(S, REWARDS * 0.05, tau=0.05).loss, gdro_loss(S, REWARDS, tau=1.0).loss)


def test_rank_by_hand() -> None:
    """L = (ln 6 - 0) + (ln 5 - ln 2) = ln 15: the Plackett-Luce probability of the order is 1/6 * 2/5."""
    assert rank_loss(S, REWARDS).loss.item() == pytest.approx(math.log(15), abs=1e-12)


def test_top1_by_hand() -> None:
    """L = ln 6 - (ln 2 / 3 + ln 3 / 6) with q_1 = (1/2, 1/3, 1/6); at tau = 0 it is ln 6 - s_best = ln 6."""
    assert top1_loss(S, REWARDS, tau=1.0).loss.item() == pytest.approx(LN6 - LN2 / 3 - LN3 / 6, abs=1e-12)
    assert top1_loss(S, REWARDS, tau=0.0).loss.item() == pytest.approx(LN6, abs=1e-12)


def test_dpo_by_hand() -> None:
    """-log sigmoid(s_i - s_j) = ln(1 + exp(s_j) / exp(s_i)).

    Best against worst: ln(1 + 3/1) = ln 4.
    All pairs: (ln(1 + 2/1) + ln(1 + 3/1) + ln(1 + 3/2)) / 3 = ln 30 / 3.
    """
    assert dpo_loss(S, REWARDS).loss.item() == pytest.approx(math.log(4), abs=1e-12)
    assert dpo_loss(S, REWARDS, pairs="all").loss.item() == pytest.approx(math.log(30) / 3, abs=1e-12)


def test_sft_by_hand() -> None:
    """q = softmax(ln 1, ln 3, ln 2) = (1, 3, 2) / 6 of the errors 0.6, 1.2, 0.3; the best alone at tau 0; K = 1."""
    errors = torch.tensor([[0.6, 1.2, 0.3]], dtype=torch.float64)
    assert sft_loss(errors, REWARDS, tau=1.0).loss.item() == pytest.approx((0.6 + 3 * 1.2 + 2 * 0.3) / 6, abs=1e-12)
    assert sft_loss(errors, REWARDS, tau=0.0).loss.item() == 1.2
    unscored = torch.tensor([[True, False, True]])
    assert sft_loss(errors, REWARDS, tau=0.0, mask=unscored).loss.item() == 0.3
    assert sft_loss(errors, REWARDS, tau=0.0, mask=torch.zeros_like(unscored)).loss.item() == 0.0
    assert sft_loss(errors[:, :1], REWARDS[:, :1], tau=0.0).loss.item() == 0.6


def test_sft_takes_no_reference_and_its_gradient_is_q() -> None:
    errors = torch.tensor([[0.6, 1.2, 0.3]], dtype=torch.float64)
    for reference in (torch.zeros_like(errors), errors + 1):
        weights = image_weights("sft", errors, reference, REWARDS, beta=12.0, gamma=0.0, tau=1.0)
        assert weights.tolist() == [pytest.approx([1 / 6, 3 / 6, 2 / 6])]
        output = group_loss("sft", errors, reference, REWARDS, beta=12.0, gamma=0.0, tau=1.0)
        assert output.loss.item() == pytest.approx(4.8 / 6)


def test_regression_by_hand() -> None:
    """q - 1/3 = (1, 3, 2) / 6 - 1/3 = (-1, 1, 0) / 6; the sum of squares of s is (ln 3)^2 + (ln 2)^2.

    lair, lambda 2: (ln 3)^2 + (ln 2)^2 - (-ln 3 / 6).
    crd of r = (1, 3, 2), lambda 2: A = (-1, 1, 0) sqrt(3/2); s = (0, 3, 0) has the mean 1, so the residuals are
    (-1 + a, 2 - a, -1) with a = sqrt(3/2) / 2.
    """
    lair = regression_loss(S, REWARDS, target="lair", tau=1.0, penalty=2.0)
    assert lair.loss.item() == pytest.approx(LN3**2 + LN2**2 + LN3 / 6, abs=1e-12)
    s, r = torch.tensor([[0.0, 3.0, 0.0]]).double(), torch.tensor([[1.0, 3.0, 2.0]]).double()
    a = math.sqrt(3 / 2) / 2
    crd = regression_loss(s, r, target="crd", tau=1.0, penalty=2.0)
    assert crd.loss.item() == pytest.approx(((a - 1) ** 2 + (2 - a) ** 2 + 1) / 3, abs=1e-12)


@pytest.mark.parametrize("target", ["lair", "crd"])
def test_the_optimum_of_the_regression_is_its_target_over_the_penalty(target: Literal["lair", "crd"]) -> None:
    """s = a / lambda: no gradient there, and the loss is its floor; lair's optimum is bounded by 1 / lambda."""
    r = torch.tensor([[0.0, 1.0, 0.5, 0.5]], dtype=torch.float64)
    wanted = {
        "lair": (r / 0.1).softmax(dim=1) - 1 / 4,
        "crd": (r - 0.5) / math.sqrt(0.125),
    }[target]

    def loss(s: Tensor, r: Tensor, mask: Tensor | None = None) -> LossOutput:
        return regression_loss(s, r, target=target, tau=0.1, penalty=4.0, mask=mask)

    best = loss(wanted / 4, r)
    torch.testing.assert_close(best.loss, best.metrics["loss_floor"])
    assert gradient(loss, wanted / 4, r).abs().max() < 1e-12
    assert loss(wanted / 4 + 0.1 * torch.tensor([1.0, -1.0, 0.0, 0.0]), r).loss > best.loss + 1e-3


def test_lair_holds_the_size_of_s_itself() -> None:
    """Raising all s of a group by 1 adds lambda / 2 * (1 + 2 s) for each image; the other losses do not see it."""
    s, r = random_groups(groups=1, images=4, seed=12, ties=False)
    added = LOSSES["lair"](s + 1, r).loss - LOSSES["lair"](s, r).loss
    assert added.item() == pytest.approx(float((0.7 / 2 * (1 + 2 * s)).sum()))


def test_dgpo_by_hand() -> None:
    """r = (1, 3, 2): A = (-1, 1, 0) sqrt(3/2); s = (ln 3, 0, ln 2): the margin is -ln 3 sqrt(3/2) / 3."""
    r = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64)
    expected = math.log1p(math.exp(LN3 * math.sqrt(3 / 2) / 3))
    assert dgpo_loss(S, r).loss.item() == pytest.approx(expected, abs=1e-12)
    assert dgpo_loss(S, 100 * r + 7).loss.item() == pytest.approx(expected, abs=1e-12)
    assert dgpo_loss(S, torch.full_like(S, 0.1)).loss.item() == 0.0


def test_dgpo_with_two_images_is_dpo_at_half_the_margin() -> None:
    s, r = random_groups(groups=5, images=2, seed=11, ties=False)
    torch.testing.assert_close(dgpo_loss(s, r).per_group, dpo_loss(s / 2, r).per_group)


def mixed_distances(v: Tensor, own: Tensor, reference: Tensor, r: list[float], *, mixing: float, clip: float) -> float:
    """DiffusionNFT's loss of one group, from the velocities themselves [K, D]."""
    total = 0.0
    for i in range(len(r)):
        advantage = (r[i] - statistics.fmean(r)) / statistics.pstdev(r)
        good = 0.5 + 0.5 * max(-1.0, min(1.0, advantage / clip))
        positive = (1 - mixing) * reference[i] + mixing * own[i]
        negative = (1 + mixing) * reference[i] - mixing * own[i]
        total += good * float((positive - v[i]).square().mean())
        total += (1 - good) * float((negative - v[i]).square().mean())
    return total / len(r)


def nft_scalars(*, images: int, seed: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """Rewards [1, K]; errors, reference errors and deviations [1, K]; the velocities [K, D] that they come from."""
    stream = torch.Generator().manual_seed(seed)
    v, own, reference = torch.randn(3, images, 5, generator=stream, dtype=torch.float64)
    r = torch.rand(1, images, generator=stream, dtype=torch.float64)
    pairs = ((own, v), (reference, v), (own, reference))
    errors, reference_errors, deviations = ((a - b).square().mean(dim=1)[None] for a, b in pairs)
    return r, (errors, reference_errors, deviations), (v, own, reference)


@pytest.mark.parametrize(("mixing", "clip"), [(1.0, 5.0), (0.1, 5.0), (0.5, 0.8)])
def test_nft_from_three_scalars_is_that_of_the_mixed_velocities(mixing: float, clip: float) -> None:
    r, scalars, velocities = nft_scalars(images=4, seed=13)
    expected = mixed_distances(*velocities, r[0].tolist(), mixing=mixing, clip=clip)
    assert nft_loss(*scalars, r, mixing=mixing, advantage_clip=clip).loss.item() == pytest.approx(expected, abs=1e-12)


def test_nft_by_hand() -> None:
    """K = 2, A = (1, -1), b = 1, e = (3, 2), e_ref = (2, 2), D = (1, 2), so -2 <t, d> = (0, -2).

    A at the clip: p = (1, 0), v+ of the first is its e = 3, v- of the second 2 + 2 + 2 = 6: (3 + 6) / 2.
    Clip 2: p = (3/4, 1/4): the first has 3 with either, the second 1/4 * 2 + 3/4 * 6 = 5: (3 + 5) / 2.
    """
    e, reference, apart = (torch.tensor([x], dtype=torch.float64) for x in ([3.0, 2.0], [2.0, 2.0], [1.0, 2.0]))
    r = torch.tensor([[0.9, 0.1]], dtype=torch.float64)
    assert nft_loss(e, reference, apart, r, mixing=1.0, advantage_clip=1.0).loss.item() == pytest.approx(4.5, abs=1e-12)
    assert nft_loss(e, reference, apart, r, mixing=1.0, advantage_clip=2.0).loss.item() == pytest.approx(4.0, abs=1e-12)


def test_nft_fits_a_wholly_good_image_as_sft_does() -> None:
    """p = 1 and b = 1: v+ is the policy's velocity, so the image's term is its error; deviations do not matter."""
    r, (errors, reference, apart), _ = nft_scalars(images=2, seed=14)
    best = int(r.argmax())
    leaves = [x.clone().requires_grad_(True) for x in (errors, apart)]
    out = nft_loss(leaves[0], reference, leaves[1], r, mixing=1.0, advantage_clip=0.5)
    of_errors, of_deviations = torch.autograd.grad(out.loss, leaves)
    assert of_errors[0, best].item() == pytest.approx(1 / 2)  # a mean over two images
    assert of_deviations[0, best].item() == 0.0


def test_nft_with_little_mixing_follows_the_advantages_alone() -> None:
    """(L - mean e_ref) / b -> mean of -2 <t, d> (2 p - 1): the penalty on the deviation vanishes with b."""
    r, (errors, reference, apart), (v, own, base) = nft_scalars(images=4, seed=15)
    a = (r[0] - r.mean()) / r.std(correction=0) / 5
    expected = float((-2 * a * ((own - base) * (v - base)).mean(dim=1)).mean())
    loss = nft_loss(errors, reference, apart, r, mixing=1e-4, advantage_clip=5.0).loss - reference.mean()
    assert float(loss) / 1e-4 == pytest.approx(expected, abs=1e-3)
    assert abs(expected) > 0.01


def test_nft_reaches_its_floor_at_the_guided_velocity() -> None:
    """||t - b d||^2 and ||t + b d||^2 with weights p and 1 - p are least at b d = (2 p - 1) t."""
    r, (_, reference, _), (v, _, base) = nft_scalars(images=4, seed=17)
    lean = (r - r.mean()) / r.std(correction=0) / 5  # 2 p - 1
    t = v - base
    settings = {"mixing": 0.5, "advantage_clip": 5.0}
    for scale, above in ((1.0, 0.0), (1.3, 1e-3), (0.7, 1e-3)):
        d = scale * lean[0, :, None] * t / 0.5
        errors, apart = (t - d).square().mean(dim=1)[None], d.square().mean(dim=1)[None]
        out = nft_loss(errors, reference, apart, r, **settings)
        left = float(out.loss - out.metrics["loss_floor"])
        assert left == pytest.approx(0.0, abs=1e-12) if above == 0 else left > above


@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
def test_nft_leaves_out_unscored_images(junk: float) -> None:
    r, scalars, _ = nft_scalars(images=4, seed=16)
    settings = {"mixing": 0.5, "advantage_clip": 1.5}
    keep = [3, 0, 2]  # another order on the way
    expected = nft_loss(*(x[:, keep] for x in scalars), r[:, keep], **settings).loss
    mask = torch.tensor([[True, False, True, True]])
    broken = [x.masked_fill(~mask, junk) for x in (*scalars, r)]
    torch.testing.assert_close(nft_loss(*broken, mask=mask, **settings).loss, expected)
    alone = torch.tensor([[False, False, True, False]])
    assert nft_loss(*scalars, r, mask=alone, **settings).loss == 0.0


@pytest.mark.parametrize("method", ["gdro", "sft"])
def test_a_weight_multiplies_all_of_a_groups_loss(method: str) -> None:
    errors, reference = torch.rand(2, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64)
    rewards = torch.rand(2, 3, dtype=torch.float64)
    settings = {"beta": 6.0, "gamma": 0.5, "tau": 0.1}
    plain = group_loss(method, errors, reference, rewards, **settings)
    heavy = group_loss(method, errors, reference, rewards, weights=torch.tensor([3.0, 0.5]), **settings)
    assert heavy.per_group.tolist() == pytest.approx((plain.per_group * torch.tensor([3.0, 0.5])).tolist())
    assert float(heavy.metrics["loss_method"] + heavy.metrics["loss_stabiliser"]) == pytest.approx(heavy.loss.item())
    one = image_weights(method, errors, reference, rewards, **settings)
    other = image_weights(method, errors, reference, rewards, weights=torch.tensor([3.0, 0.5]), **settings)
    assert torch.allclose(other, one * torch.tensor([[3.0], [0.5]]))


def test_ties_share_the_target_and_the_remaining_set() -> None:
    """r = (1, 1, 0), s = (0, ln 2, ln 3): rank 1 is ln 6 - ln 2 / 2, rank 2 is ln(1 / 2 + 2 / 2 + 3) - ln 2 / 2."""
    s = torch.tensor([[0.0, LN2, LN3]], dtype=torch.float64)
    r = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    expected = LN6 - LN2 / 2 + math.log(4.5) - LN2 / 2
    for value in (gdro_loss(s, r, tau=0.0), gdro_loss(s, r, tau=1e-4), rank_loss(s, r)):
        assert value.loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tau", [0.05, 0.3, 0.0])
def test_a_tie_is_the_mean_over_its_orders(tau: float) -> None:
    """Loss and gradient are the means over the orders where tied images have equal s; elsewhere the loss is above."""
    r = torch.tensor([[0.6, 0.2, 0.6, 0.6, 0.2]], dtype=torch.float64)
    orders = [r + torch.tensor([step]) * 1e-9 for step in itertools.permutations(range(5))]
    tied, apart = 1.7 * r, random_groups(groups=1, images=5, seed=15, ties=False)[0]

    def mean(s: Tensor) -> Tensor:
        return torch.stack([gdro_loss(s, order, tau=tau).loss for order in orders]).mean()

    def mean_gradient(s: Tensor) -> Tensor:
        leaf = s.clone().requires_grad_(True)
        return torch.autograd.grad(mean(leaf), leaf)[0]

    torch.testing.assert_close(gdro_loss(tied, r, tau=tau).loss, mean(tied), atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(partial(gdro_loss, tau=tau), tied, r), mean_gradient(tied), atol=1e-6, rtol=0)
    assert mean(apart) + 1e-3 < gdro_loss(apart, r, tau=tau).loss


def test_dpo_ties_share_best_and_worst() -> None:
    """r = (1, 1, 0): the pairs (1, 3) and (2, 3) at half weight each: (ln(1 + 3/1) + ln(1 + 3/2)) / 2."""
    s = torch.tensor([[0.0, LN2, LN3]], dtype=torch.float64)
    r = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    assert dpo_loss(s, r).loss.item() == pytest.approx((math.log(4) + math.log(2.5)) / 2, abs=1e-12)


def test_stabiliser_by_hand() -> None:
    """The error of the best image, 0.4; of two best images half each, (0.4 + 0.6) / 2 = 0.5."""
    errors = torch.tensor([[0.2, 0.4, 0.6], [0.2, 0.4, 0.6]], dtype=torch.float64)
    rewards = torch.tensor([[0.0, 1.0, 0.5], [0.0, 1.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([0.4, 0.5], dtype=torch.float64)
    torch.testing.assert_close(top1_stabiliser(errors, rewards), expected)


def test_group_loss_by_hand() -> None:
    """e = 1, e_ref = 1 + s / 2 and beta = 2 give the worked s; L = ln 30 - ln 2 - ln 3 / 2 + 0.5 * 1."""
    errors = torch.ones_like(S)
    out = group_loss("gdro", errors, 1 + S / 2, REWARDS, beta=2.0, gamma=0.5, tau=1.0)
    method = math.log(30) - LN2 - LN3 / 2
    assert out.loss.item() == pytest.approx(method + 0.5, abs=1e-12)
    assert out.metrics["loss_method"].item() == pytest.approx(method, abs=1e-12)
    assert out.metrics["loss_stabiliser"].item() == pytest.approx(0.5, abs=1e-12)


def test_image_weights_by_hand() -> None:
    """dL/de = -beta dL/ds + gamma M, dL/ds = (3/5, -1/3, -4/15) as stored, M on the second image."""
    weights = image_weights("gdro", torch.ones_like(S), 1 + S / 2, REWARDS, beta=2.0, gamma=0.5, tau=1.0)
    torch.testing.assert_close(weights, torch.tensor([[-6 / 5, 2 / 3 + 0.5, 8 / 15]], dtype=torch.float64))
    assert not weights.requires_grad


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_agrees_with_literal_equations(name: str, ties: bool) -> None:
    s, r = random_groups(groups=7, images=6, seed=1, ties=ties)
    mask = torch.rand(7, 6, generator=torch.Generator().manual_seed(2)) > 0.25
    mask[0] = True
    mask[1] = torch.tensor([False, True, False, False, False, False])
    mask[2] = False
    expected = [literal(name, s[b][mask[b]].tolist(), r[b][mask[b]].tolist()) for b in range(7)]
    out = LOSSES[name](s, r, mask=mask)
    torch.testing.assert_close(out.per_group, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(out.loss, out.per_group.mean())


@every_loss
def test_permutation_inside_a_group(loss: Loss) -> None:
    """The loss does not depend on the order of storage; gradients move with their images."""
    s, r = random_groups(groups=1, images=4, seed=3, ties=False)
    base = gradient(loss, s, r)
    for order in itertools.permutations(range(4)):
        index = list(order)
        torch.testing.assert_close(loss(s[:, index], r[:, index]).loss, loss(s, r).loss)
        torch.testing.assert_close(gradient(loss, s[:, index], r[:, index]), base[:, index])


@every_loss
def test_permutation_of_tied_images(loss: Loss) -> None:
    s, _ = random_groups(groups=1, images=5, seed=4, ties=False)
    r = torch.tensor([[1.0, 1.0, 0.5, 0.0, 0.0]], dtype=torch.float64)
    swapped = [1, 0, 2, 4, 3]
    torch.testing.assert_close(loss(s[:, swapped], r).loss, loss(s, r).loss)
    torch.testing.assert_close(gradient(loss, s[:, swapped], r), gradient(loss, s, r)[:, swapped])


@pytest.mark.parametrize("loss", [loss for name, loss in LOSSES.items() if name != "lair"])
def test_shift_of_s_changes_nothing(loss: Loss) -> None:
    """The beta log Z(c) term of eqs. 14 and 16 is one constant per group. (lair holds the size of s itself.)"""
    s, r = random_groups(groups=3, images=5, seed=5, ties=False)
    shift = torch.tensor([[4.0], [-70.0], [1000.0]], dtype=torch.float64)
    torch.testing.assert_close(loss(s + shift, r).loss, loss(s, r).loss)
    torch.testing.assert_close(gradient(loss, s + shift, r), gradient(loss, s, r))
    torch.testing.assert_close(gradient(loss, s, r).sum(dim=1), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("s_values", [(0.3, -1.2), (5.0, 9.0), (0.0, 0.0)])
def test_gdro_with_two_images_and_tau_zero_is_dpo(s_values: tuple[float, float]) -> None:
    s = torch.tensor([s_values], dtype=torch.float64)
    r = torch.tensor([[0.2, 0.9]], dtype=torch.float64)
    expected = -math.log(1 / (1 + math.exp(s_values[0] - s_values[1])))
    for value in (dpo_loss(s, r), gdro_loss(s, r, tau=0.0), gdro_loss(s, r, tau=0.02), rank_loss(s, r)):
        assert value.loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_tau_zero_is_the_limit(ties: bool) -> None:
    """The smallest gap between different rewards is far above 1e-6, so softmax at tau = 1e-6 is one-hot."""
    s, r = random_groups(groups=5, images=6, seed=7, ties=ties)
    for loss in (gdro_loss, top1_loss):
        torch.testing.assert_close(loss(s, r, tau=1e-6).per_group, loss(s, r, tau=0.0).per_group)


@pytest.mark.parametrize("tau", [1e-30, 1e-44, 1e-300])
def test_tau_below_the_smallest_float(tau: float) -> None:
    s, r = (x.float() for x in random_groups(groups=3, images=5, seed=8, ties=True))
    torch.testing.assert_close(gdro_loss(s, r, tau=tau).per_group, gdro_loss(s, r, tau=0.0).per_group)


def test_equal_rewards_ask_for_equal_s() -> None:
    """Every q is uniform: at equal s there is no gradient, and L = ln 2 + ln 3 + ln 4."""
    s, r = torch.zeros(1, 4, dtype=torch.float64), torch.full((1, 4), 0.7, dtype=torch.float64)
    for tau in (0.0, 0.05):
        assert gdro_loss(s, r, tau=tau).loss.item() == pytest.approx(math.log(24), abs=1e-12)
        grad = gradient(lambda s, r, mask=None, tau=tau: gdro_loss(s, r, tau=tau, mask=mask), s, r)
        torch.testing.assert_close(grad, torch.zeros_like(grad))
    assert dpo_loss(s, r).loss.item() == 0.0


@pytest.mark.parametrize(("method", "settings"), [("gdro", {"tau": 0.05}), ("rank", {})])
def test_beta_to_zero(method: str, settings: dict[str, float]) -> None:
    """s -> 0, so L -> ln K! = ln 24 and the weights vanish in proportion to beta."""
    stream = torch.Generator().manual_seed(9)
    errors, reference, r = torch.rand(3, 1, 4, generator=stream, dtype=torch.float64)

    def weights(beta: float) -> Tensor:
        return image_weights(method, errors, reference, r, beta=beta, gamma=0.0, **settings)

    out = group_loss(method, errors, reference, r, beta=0.0, gamma=0.0, **settings)
    assert out.loss.item() == pytest.approx(math.log(24), abs=1e-12)
    assert not weights(0.0).any()
    torch.testing.assert_close(weights(1e-7) / 1e-7, weights(1e-8) / 1e-8, atol=1e-6, rtol=0)
    assert weights(1e-7).abs().max() > 1e-9


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tau", [0.05, 0.3, 0.0])
def test_loss_floor_is_reached_by_the_rewards_themselves(tau: float, ties: bool) -> None:
    """s = r / tau makes P equal to Q on every remaining set; at tau = 0 any steep s does."""
    s, r = random_groups(groups=4, images=5, seed=10, ties=ties)
    best = gdro_loss(r / (tau or 1e-6), r, tau=tau)
    torch.testing.assert_close(best.loss, best.metrics["loss_floor"])
    away = gdro_loss(s, r, tau=tau)
    assert away.loss > away.metrics["loss_floor"] + 0.1
    assert not away.metrics["loss_floor"].requires_grad


def test_extreme_s_stays_finite_in_float32() -> None:
    s = torch.tensor([[3e4, -3e4, 0.0, 1e4]], requires_grad=True)
    r = torch.tensor([[0.1, 0.9, 0.5, 0.5]])
    for loss in LOSSES.values():
        (grad,) = torch.autograd.grad(loss(s, r).loss, s)
        assert torch.isfinite(loss(s, r).loss)
        assert torch.isfinite(grad).all()


def test_half_precision_is_raised_to_float32() -> None:
    out = gdro_loss(S.bfloat16(), REWARDS.bfloat16(), tau=1.0)
    assert out.loss.dtype == torch.float32
    assert gdro_loss(S, REWARDS.float(), tau=1.0).loss.dtype == torch.float64


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="one shape"):
        gdro_loss(S, REWARDS[:, :2], tau=1.0)
    with pytest.raises(ValueError, match="tau must be 0 or above"):
        gdro_loss(S, REWARDS, tau=-0.1)
    with pytest.raises(ValueError, match="pairs must be"):
        dpo_loss(S, REWARDS, pairs="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target must be"):
        regression_loss(S, REWARDS, target="some", tau=1.0, penalty=1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'nft' needs deviations"):
        group_loss("nft", S, S, REWARDS, beta=1.0, gamma=0.0, mixing=1.0, advantage_clip=5.0)
    with pytest.raises(ValueError, match="not finite"):
        rank_loss(S, torch.full_like(S, torch.nan))
    with pytest.raises(ValueError, match="mask must be bool"):
        rank_loss(S, REWARDS, mask=torch.ones_like(S))
    with pytest.raises(KeyError, match="ppo"):
        group_loss("ppo", S, S, REWARDS, beta=1.0, gamma=0.0)
    with pytest.raises(TypeError, match="tau"):
        group_loss("gdro", S, S, REWARDS, beta=1.0, gamma=0.0)
