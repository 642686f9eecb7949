"""The source images of an editing model's prompts: whether they are there, and their encoding."""

from __future__ import annotations

from collections.abc import Sequence

from gdro_cli.data.records import PromptRecord
from gdro_cli.errors import UserError
from gdro_cli.models.base import Conditioning, FlowModel
from gdro_cli.models.diffusers_flow import FAMILIES


def check_sources(prompts: Sequence[PromptRecord], model: FlowModel, *, where: str, key: str) -> None:
    """Check that prompts have source images if the model edits images, and none if it does not.

    Args:
        prompts: the prompts.
        model: the recipe's model.
        where: where the prompts come from, for the message.
        key: the key that names a prompt's image there.

    Raises:
        UserError: some do not fit the model.
    """
    wrong = [prompt for prompt in prompts if (prompt.image_sha256 is not None) != model.edits]
    if not wrong:
        return
    count, first = f"{len(wrong)} of {len(prompts)} prompts", repr(wrong[0].prompt[:80])
    if model.edits:
        raise UserError(
            f"{where}: {count} have no image to edit, the first is {first}, and {model.folder.pipeline} edits images:"
            f" give each prompt its `{key}`, or choose a model that draws from text"
        )
    editors = " or ".join(name for name, family in FAMILIES.items() if family.edits)
    raise UserError(
        f"{where}: {count} have an image to edit, the first is {first}, and {model.folder.pipeline} draws from text"
        f" alone: remove `{key}`, or choose a model of {editors}"
    )


def encode_prompts(model: FlowModel, prompts: Sequence[PromptRecord]) -> list[Conditioning]:
    """The conditioning of prompts: their texts, and their source images if the model edits images.

    Raises:
        UserError: the file of a source image is gone, or has changed since the prompts were read.
    """
    sources = [source for prompt in prompts if model.edits and (source := prompt.source) is not None]
    return model.encode([prompt.prompt for prompt in prompts], sources)
