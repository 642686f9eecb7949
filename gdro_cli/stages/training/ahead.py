"""What a training needs after its images are sampled and scored, checked before: no mistake may cost hours of them."""

from __future__ import annotations

from gdro_cli.models.adapters import check_targets
from gdro_cli.runtime.optimizer import check_optimizer
from gdro_cli.stages.setup.scorers import check_servers
from gdro_cli.stages.setup.session import Session


def check_ahead(session: Session) -> None:
    """Check the optimizer, the adapter's layers, and what the evaluation points need. Nothing is loaded or written.

    Raises:
        UserError: ``train.lora.targets`` names no layer, or the validation prompts cannot be used.
        PrerequisiteError: a package, the judge's files or a server is not there.
    """
    recipe, train = session.recipe, session.recipe.train
    check_optimizer(train.optimizer)
    check_targets(session.model, train.lora.targets)
    if train.eval_every or train.rounds > 1 or recipe.online_method is not None:
        check_servers(session.reward)
    if train.eval_every:
        session.prompts("validation")
        if session.judge is not None:
            check_servers(session.judge)
