"""The stores of a workspace: how their images are sampled, how they are named and how they are opened.

    <out>/stores/<family>-<digest>/    groups of images, named by what the images depend on
    <out>/runs/<recipe>-<digest>/      one training run, named by what the training depends on

So recipes that sample the same images share one store, whatever their rewards, and other recipes never use it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gdro_cli.config.keys import values_that_affect
from gdro_cli.core.seeds import seed_for
from gdro_cli.data.prompts import PromptSet
from gdro_cli.data.store import GroupStore
from gdro_cli.identity import digest
from gdro_cli.stages.setup.session import Session


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """What the images of a store depend on, apart from the model and the prompts."""

    seed: int
    images_per_prompt: int
    steps: int
    guidance: float
    height: int
    width: int

    def image_seed(self, prompt_id: str, index: int) -> int:
        """Seed of the noise of image ``index`` of a prompt, whatever the batch, shard or process."""
        return seed_for(self.seed, "image", prompt_id, index)


def training_plan(session: Session) -> SamplingPlan:
    """How the groups of the training store are sampled."""
    sample = session.recipe.sample
    return SamplingPlan(
        session.recipe.seed, sample.images_per_prompt, sample.steps, sample.guidance, *session.image_size
    )


def evaluation_plan(session: Session, *, images_per_prompt: int) -> SamplingPlan:
    """How images for an evaluation are sampled."""
    recipe = session.recipe
    return SamplingPlan(
        recipe.eval.seed, images_per_prompt, recipe.eval_steps, recipe.eval_guidance, *session.image_size
    )


def store_identity(
    session: Session, plan: SamplingPlan, prompts: PromptSet, *, weights: str = "base"
) -> dict[str, Any]:
    """What a store's images depend on, as JSON; ``weights`` names the adapter, if there is one.

    It has the model's own digests and dtype, not the model's path or ``auto``.
    """
    model, settings = session.model, values_that_affect(session.recipe, "images")["model"]
    return {
        "model": {key: value for key, value in model.identity.items() if key != "path"},
        **{key: value for key, value in settings.items() if key != "path"},
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights,
        "prompts": prompts.digest,
        **asdict(plan),
    }


def training_identity(session: Session) -> dict[str, Any]:
    """What the images of the training store depend on."""
    if session.imported_store is not None:
        return _imported_identity(session, session.imported_store)
    return store_identity(session, training_plan(session), session.prompts("train"))


def _imported_identity(session: Session, store: GroupStore) -> dict[str, Any]:
    """What a training on imported data depends on: the model, as for sampled images, and what was encoded."""
    model, settings = session.model, values_that_affect(session.recipe, "images")["model"]
    tensors = [store.tensors_digest(number) for number in range(len(store.shards))]
    return {
        **store.identity,
        "model": {key: value for key, value in model.identity.items() if key != "path"},
        **{key: value for key, value in settings.items() if key != "path"},
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights of groups": digest(dict(store.weights)),
        "tensors": digest(tensors),
    }


def store_path(session: Session, folder: Path, identity: dict[str, Any]) -> Path:
    """Path of the store of ``identity`` below ``folder``."""
    return folder / f"{session.model.family}-{digest(identity)}"


def open_store(
    session: Session,
    folder: Path,
    plan: SamplingPlan,
    prompts: PromptSet,
    *,
    weights: str = "base",
    command: str = "gdro sample",
) -> GroupStore:
    """Make or open a store below ``folder``, with a group for each prompt; it may still be empty.

    ``weights`` names the adapter, if there is one. Error messages name ``command``, which makes the shards.
    """
    identity = store_identity(session, plan, prompts, weights=weights)
    sample = session.recipe.sample
    return GroupStore.create_or_open(
        store_path(session, folder, identity),
        identity=identity,
        prompts=prompts,
        images_per_prompt=plan.images_per_prompt,
        prompts_per_shard=sample.prompts_per_shard,
        image_format=sample.image_format,
        command=command,
    )


def open_training_store(session: Session) -> GroupStore:
    """Make or open the training store, in the main process for all."""
    return session.engine.from_main(lambda: training_store(session))


def training_store(session: Session) -> GroupStore:
    """Make or open the training store, in this process alone."""
    if session.imported_store is not None:
        return session.imported_store
    return open_store(session, stores_folder(session.workspace), training_plan(session), session.prompts("train"))


def stores_folder(workspace: Path) -> Path:
    """Folder of the stores that base models fill."""
    return workspace / "stores"


def runs_folder(workspace: Path) -> Path:
    """Folder of the training runs."""
    return workspace / "runs"
