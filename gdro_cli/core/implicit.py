"""The implicit reward: how much better than the reference the policy explains an image."""

from __future__ import annotations

from torch import Tensor

from gdro_cli.core.flow import Reduction, as_float


def implicit_reward(error: Tensor, reference_error: Tensor, *, beta: float) -> Tensor:
    """Return ``s = -beta * (e_theta - e_ref)`` (GDRO paper, arXiv 2601.02036, eqs. 3, 5, 13).

    Both errors come from the same latents, sigma and noise. Where s > 0, the policy explains the image better than the
    reference does. The term ``beta log Z(c)`` of eqs. 14 and 16 is left out: it is the same for all images of a group,
    so it changes no loss and no gradient.

    Args:
        error: velocity error of the policy, any shape, usually [B, K].
        reference_error: velocity error of the reference, same shape; no gradient flows into it.
        beta: ``T * beta_KL``, > 0 in training, in 1 / unit of the errors.

    Returns:
        Implicit rewards, same shape, at least float32.

    Raises:
        ValueError: shapes differ.
    """
    if error.shape != reference_error.shape:
        raise ValueError(
            f"errors {list(error.shape)} and reference errors {list(reference_error.shape)} differ in shape"
        )
    return -beta * (as_float(error) - as_float(reference_error).detach())


def equivalent_beta(beta: float, *, latent_dims: int, given: Reduction, wanted: Reduction) -> float:
    """Convert a beta from one error reduction to the other so that the implicit reward stays the same.

    A sum over D latent dims is D times the mean, so ``beta_sum = beta_mean / D``. The weight gamma of the top-1
    stabilisation also multiplies an error and converts the same way.

    Args:
        beta: the value in the ``given`` convention.
        latent_dims: D, the number of latent values of one image (FLUX at 512 x 512 pixels: 65,536).
        given: reduction that ``beta`` belongs to.
        wanted: reduction to convert to.
    """
    if given == wanted:
        return beta
    return beta / latent_dims if wanted == "sum" else beta * latent_dims
