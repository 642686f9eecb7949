"""Images of a few validation prompts with the kept weights of each setting: same noise, the base model first."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from gdro_cli.config.recipe import Recipe
from gdro_cli.data.records import PromptRecord
from gdro_cli.files import write_bytes
from gdro_cli.identity import digest
from gdro_cli.models.base import Conditioning
from gdro_cli.models.latents import NOT_FINITE
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.ablation.result import Ablation
from gdro_cli.stages.ablation.trials import free_devices
from gdro_cli.stages.reporting.image_sheet import blank, decoded
from gdro_cli.stages.runs.weights import RunWeights, applied, evaluated_weights
from gdro_cli.stages.sampling.fill_store import decode_images, sample_images
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.sources import encode_prompts
from gdro_cli.stages.setup.store import evaluation_plan

PROMPTS = 4
"""Prompts shown, at most `eval.grid_prompts`: the first ones of the validation prompts."""
FOLDER = "images"


@dataclass(frozen=True, slots=True)
class ImageRow:
    """The images of one model."""

    label: str
    about: str
    """Which weights drew them, or why there are none."""
    files: tuple[Path, ...]
    """One per prompt; empty where there are no weights."""


@dataclass(frozen=True, slots=True)
class Images:
    """The images of a report: a row per setting (its first seed), a column per prompt."""

    prompts: tuple[PromptRecord, ...]
    rows: tuple[ImageRow, ...]


def draw_images(session: Session, ablation: Ablation, folder: Path) -> Images:
    """Sample the images that are missing; they are named by the weights that drew them.

    Raises:
        Interrupted: stopped by the user; finished images are kept.
    """
    prompts = session.prompts("validation").records[: min(PROMPTS, session.recipe.eval.grid_prompts)]
    if not prompts:
        return Images((), ())
    painter = _Painter(session, prompts, folder / FOLDER)
    wanted = list(_wanted(ablation))
    rows = [ImageRow("base model", "untrained", painter.draw(session.recipe, None, ablation.protocol))]
    with session.reporter.track("drawing", total=len(wanted), unit="settings") as progress:
        for label, about, cell, weights in wanted:
            session.stop.check("stopped while drawing images; run the same command again to continue")
            files = () if weights is None else painter.draw(cell, weights, ablation.protocol)
            rows.append(ImageRow(label, about, files))
            progress.advance()
    return Images(tuple(prompts), tuple(rows))


def _wanted(ablation: Ablation) -> Iterator[tuple[str, str, Recipe, RunWeights | None]]:
    """Each setting with the weights of its first seed."""
    for label in ablation.sweep.labels:
        first = ablation.of(label)[0]
        recipe = first.cell.recipe
        if first.outcome.state in ("failed", "unfinished"):
            yield label, f"{first.outcome.state}, no images", recipe, None
            continue
        weights = evaluated_weights(RunFolder(first.run), recipe)
        yield label, f"step {weights.step} ({weights.checkpoint}), seed {first.cell.seed}", recipe, weights


class _Painter:
    """Draws the prompts' first images. The prompts are encoded once, and only if an image is missing."""

    def __init__(self, session: Session, prompts: Sequence[PromptRecord], folder: Path) -> None:
        self.session, self.prompts, self.folder = session, prompts, folder
        self.conditioning: list[Conditioning] | None = None

    def draw(self, recipe: Recipe, weights: RunWeights | None, protocol: str) -> tuple[Path, ...]:
        """One file per prompt, of the base model where there are no weights."""
        name = digest([protocol, "base" if weights is None else weights.identity])
        files = tuple(self.folder / f"{name}-{prompt.id}.png" for prompt in self.prompts)
        if all(_whole(file) for file in files):
            return files
        part = self.session.part(recipe)
        model = part.model
        if self.conditioning is None:
            self.conditioning = encode_prompts(model, self.prompts)
            model.release_encoders()
        plan = evaluation_plan(part, images_per_prompt=1)
        seeds = [[plan.image_seed(prompt.id, 0)] for prompt in self.prompts]
        size = recipe.sample.batch_size
        with ExitStack() as stack:
            if weights is not None:
                stack.enter_context(applied(part, weights))
            latents = sample_images(model, self.conditioning, seeds, plan, batch_size=size)
            images = decode_images(model, latents, plan, batch_size=size)
        del part, model
        free_devices()
        for file, image in zip(files, images, strict=True):
            data = io.BytesIO()
            (blank(NOT_FINITE) if image is None else image).save(data, "PNG")
            write_bytes(file, data.getvalue())
        return files


def _whole(file: Path) -> bool:
    """Whether the file is an image; anything else that a crash or a user left there is drawn again."""
    return file.is_file() and not file.is_symlink() and decoded(file) is not None
