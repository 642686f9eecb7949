"""How the reference explains imported images, which it did not make, beside images of its own.

GDRO's implicit reward compares a policy with the reference on the same image. On an image that the reference explains
badly, the policy can lower its error without learning anything of the rewards: it learns the look of the data. The
ratio says how far the data is from what the model draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdro_cli.core.flow import interpolate, velocity_error, velocity_target
from gdro_cli.core.seeds import generator, seed_for
from gdro_cli.data.dataset import GroupDataset
from gdro_cli.models.adapters import reference
from gdro_cli.models.base import takes_two_passes
from gdro_cli.models.sampling import sample_latents
from gdro_cli.stages.setup.session import Session

FILE = "imported.json"
"""In the run."""
_PROMPTS = 8
_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True, slots=True)
class ForeignErrors:
    """Mean velocity errors of the reference over noise levels, for one image of each of a few prompts."""

    imported: float
    own: float
    prompts: int

    @property
    def sentence(self) -> str:
        """What the command line says."""
        ratio = self.imported / self.own
        return (
            f"the base model's velocity error on the imported images is {ratio:.2f} times that on its own"
            f" ({self.imported:.4f} against {self.own:.4f}, {self.prompts} prompts, the same noise)"
        )


def foreign_errors(session: Session, dataset: GroupDataset) -> ForeignErrors:
    """Draw one image for each of the first prompts, and compare the reference's errors on both kinds of images."""
    recipe, model = session.recipe, session.model
    (height, width), seed = session.image_size, recipe.train_seed
    count = min(_PROMPTS, len(dataset))
    texts, prompts = list(dataset.conditioning[:count]), dataset.prompts[:count]
    imported = torch.stack([latents[0].float() for latents in dataset.latents[:count]])
    noise = torch.stack(
        [torch.randn(imported.shape[1:], generator=generator(seed, "foreign", prompt.id)) for prompt in prompts]
    )
    # Of an editing model the store has no negative conditioning, so its own images are drawn without guidance.
    guided = not (model.edits and takes_two_passes(model, recipe.sample.guidance))
    errors: list[tuple[float, float]] = []
    with torch.no_grad(), reference(model):
        own = sample_latents(
            model,
            model.noise([seed_for(seed, "own", prompt.id) for prompt in prompts], height=height, width=width),
            texts,
            steps=recipe.sample.steps,
            guidance=recipe.sample.guidance if guided else 1.0,
            height=height,
            width=width,
            batch_size=recipe.sample.batch_size,
        ).cpu()
        for level in _LEVELS:
            both = [_error(session, clean, noise, level, texts) for clean in (imported, own)]
            errors.append((both[0], both[1]))
    model.release_encoders()  # guidance may have taken one for the empty prompt
    of_imported, of_own = zip(*errors, strict=True)
    return ForeignErrors(sum(of_imported) / len(errors), sum(of_own) / len(errors), count)


def _error(session: Session, clean: Tensor, noise: Tensor, level: float, texts: list[dict[str, Tensor]]) -> float:
    """Mean velocity error of N images at one noise level."""
    recipe, model = session.recipe, session.model
    total, size = 0.0, recipe.sample.batch_size
    height, width = session.image_size
    for first in range(0, len(clean), size):
        part = slice(first, first + size)
        x0, eps = clean[part].to(model.device), noise[part].to(model.device)
        sigma = torch.full((len(x0),), level, device=model.device)
        velocity = model.velocity(
            interpolate(x0, eps, sigma),
            sigma,
            texts[part],
            guidance=recipe.sample.guidance,
            height=height,
            width=width,
        )
        total += float(velocity_error(velocity, velocity_target(x0, eps)).sum())
    return total / len(clean)
