"""Stage ``sample``: the untrained model makes a group of images for each prompt, once."""

from __future__ import annotations

from dataclasses import dataclass

from gdro_cli.data.store import GroupStore
from gdro_cli.stages.sampling.fill_store import fill_store
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.setup.store import open_training_store, training_plan


@dataclass(frozen=True, slots=True)
class SampleResult:
    """A complete store and how much of it this call made."""

    store: GroupStore
    shards_made: int

    @property
    def summary(self) -> dict[str, str]:
        """What the command line prints."""
        prompts = len(self.store.prompts)
        return {
            "store": str(self.store.path),
            "prompts": str(prompts),
            "images": str(self.store.images_in_all),
            "shards made now": f"{self.shards_made} of {len(self.store.shards)}",
        }


def run(session: Session) -> SampleResult:
    """Make the missing shards of the recipe's training store.

    Raises:
        UserError: the reward cannot use the prompts, or the recipe's method has no store.
        PrerequisiteError: the model is missing.
        StoreError: the store is damaged or cannot be written to.
        Interrupted: stopped by the user; finished shards are kept.
    """
    session.require_store("sample")
    with session:
        store = open_training_store(session)
        return SampleResult(store, fill_store(session, store, training_plan(session)))
