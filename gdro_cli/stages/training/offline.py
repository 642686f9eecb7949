"""Gradients from stored groups: GDRO and its relatives align the adapter's implicit rewards with the explicit ones.

What differs from the GDRO paper (arXiv 2601.02036):

- The reference is the same transformer with its adapter off, never a second copy.
- The group gradient may take two passes, which is exact and needs the memory of one micro-batch.
- Sigma and noise come from named streams, so a resumed run continues bit-exactly on the CPU.
- The K images of a group are drawn again until their rewards differ (``GroupDataset.draw``).
- The images of a group share sigma and noise.

Everything else follows the recipe, whose header says where its numbers come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from gdro_cli.config.methods import GroupMethod
from gdro_cli.core.losses import DEVIATION_LOSSES
from gdro_cli.data.dataset import GroupBatch, GroupDataset
from gdro_cli.data.references import ReferenceErrors
from gdro_cli.data.scores import ScoreTable
from gdro_cli.models.adapters import Ema
from gdro_cli.runtime.distributed import Engine
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.runs.identity import run_inputs, run_path
from gdro_cli.stages.runs.store_times import batch_of, note_batch
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training.batch_sizes import check_shares, micro_batch, takes_one_pass
from gdro_cli.stages.training.foreign import FILE, ForeignErrors, foreign_errors
from gdro_cli.stages.training.group_gradient import (
    GroupGradient,
    NoisyGroups,
    draw_noise,
    loss_arguments,
    noise_draw,
    noisy_groups,
)
from gdro_cli.stages.training.micro_batch import MicroBatch
from gdro_cli.stages.training.prefetch import Prefetch
from gdro_cli.stages.training.step_source import ResumePoint, StepAbandoned, StepGradient


class GroupSteps:
    """Each step draws groups from the store; a ``StepSource``."""

    progress_metrics: Mapping[str, str] = {
        "loss": "loss",
        "implicit_accuracy": "accuracy",
        "top1_error_gap": "top1_gap",
    }
    remedy = "lower train.lr or method.beta"

    def __init__(
        self, session: Session, table: ScoreTable, micro: MicroBatch | None = None, *, round_number: int = 0
    ) -> None:
        self._micro = micro or MicroBatch(session)
        recipe, model, engine = session.recipe, session.model, session.engine
        method = recipe.group_method.of_round(round_number)
        check_shares(recipe, engine.world)
        model.release_encoders()
        model.release_decoder()
        self.session, self.table, self.method = session, table, method
        detail = session.reward.trained_on if recipe.train.scores is None else None
        self.dataset = GroupDataset.load(
            table.store,
            table,
            k=method.k,
            k_policy=method.k_policy,
            min_spread=method.min_spread if method.needs_order else None,
            detail=detail,
        )
        if recipe.train.shuffle_rewards:
            self.dataset = self.dataset.with_shuffled_rewards(recipe.train_seed)
        if self.dataset.counts.dropped_share or self.dataset.counts.whole:
            session.reporter.say(_left_out(self.dataset))
        self._foreign = _first_look(session, self.dataset)
        # No method of this object is passed on here and below. It would close a cycle, and the model and the images of
        # a finished training would stay in memory.
        self._prefetch = Prefetch(
            partial(_draw, session, self.dataset, method), steps=recipe.train.steps if recipe.train.prefetch else 0
        )
        self._use_micro_batch()

    def _use_micro_batch(self) -> None:
        """Compute in the recipe's micro-batches from here on."""
        session, recipe, method, engine = self.session, self.session.recipe, self.method, self.session.engine
        self._gradient = GroupGradient(
            model=session.model,
            loss=loss_arguments(method),
            reduction=method.reduction,
            guidance=recipe.sample.guidance,
            size=session.image_size,
            micro_batch=micro_batch(recipe),
            one_pass=takes_one_pass(recipe),
            backward=lambda loss: engine.backward(loss / engine.world),  # gradients are summed over processes
            between_micro_batches=partial(_hear_stop, session, self._micro),
        )
        # A sharded model's passes take all processes, so none may skip a pass because it already has the errors. A loss
        # that takes the reference's velocities has no use for errors alone.
        cached = (
            recipe.train.cache_reference and recipe.model.sharding == "none" and method.name not in DEVIATION_LOSSES
        )
        self._cache = ReferenceErrors(self.table.store, self._reference_settings()) if cached else None

    def shrink(self) -> None:
        """Halve the micro-batch."""
        self._micro.halve()
        self._use_micro_batch()

    def open(self, stack: ExitStack, folder: RunFolder, ema: Ema) -> None:
        """Note the time that the store took and, of imported images, how well the reference explains them."""
        stack.callback(self.close)
        if self._foreign is not None and self.session.engine.is_main:
            folder.write_json(FILE, asdict(self._foreign))
        with self.session.engine.together():
            if self.session.engine.is_main:
                note_batch(folder, batch_of(self.table, step=0), step=0)

    def prepare(self, step: int) -> bool:
        """True: the store is complete."""
        return True

    def resume_point(self, steps: int) -> ResumePoint:
        """Always possible: each step is a function of its number."""
        return ResumePoint.POSSIBLE

    def gradient(self, step: int) -> StepGradient:
        """The gradient of this process's share of the step's groups."""
        batch, noise = self._prefetch.take(step)
        with self._micro.trial():
            groups = noisy_groups(self.session.model, batch, noise)
            output = self._gradient(groups, self._reference_errors(batch, groups))
        metrics = averages(self.session.engine, {"loss": output.loss, **output.metrics})
        share = {"dropped_groups_share": self.dataset.counts.dropped_share}
        return StepGradient({**metrics, **share, **self._micro.metrics})

    def close(self) -> None:
        """End the thread that draws ahead."""
        self._prefetch.close()

    # -- reference errors ---------------------------------------------------------------------------------------

    def _reference_errors(self, batch: GroupBatch, groups: NoisyGroups) -> Tensor | None:
        if self._cache is None:
            return None
        keys = [
            (prompt.id, noise_draw(self.method, visit), image)
            for prompt, visit, images in zip(batch.prompts, batch.visits, batch.image_indices.tolist(), strict=True)
            for image in images
        ]
        cached = self._cache.lookup(keys).view(groups.rewards.shape)
        cached[~batch.mask] = 0  # places without an image
        errors = self._gradient.reference_errors(groups, cached)
        if cached.isnan().any():
            present = batch.mask.flatten()
            self._cache.add(list(compress(keys, present.tolist())), errors.flatten()[present.to(errors.device)])
        return errors

    def _reference_settings(self) -> dict[str, Any]:
        """What reference errors depend on, apart from the store.

        It includes what decides which images are computed together, so that cached errors are equal bit for bit. With a
        bank of noise, though, an image meets the same draw in other batches, and its errors are equal up to rounding.
        """
        recipe, method, engine = self.session.recipe, self.method, self.session.engine
        keys = ("reduction", "share_noise", "share_sigma", "sigma_min", "sigma_max", "noise_bank")
        return {
            "seed": recipe.train_seed,
            "guidance": recipe.sample.guidance,
            "method": {key: getattr(method, key) for key in keys},
            "draws": self.dataset.digest,
            "batches": [recipe.train.groups_per_step, recipe.train.micro_batch, engine.world],
            "device": engine.device.type,
            "precision": "bf16" if self.session.model.autocasts else "no",
            "compute": [recipe.model.compile, recipe.model.attention],
            # A sampled store is named by its model, an imported one only by what encodes its images.
            **({"model": run_inputs(self.session)["store"]} if self.session.imported_store is not None else {}),
        }


def _first_look(session: Session, dataset: GroupDataset) -> ForeignErrors | None:
    """How well the reference explains imported images; None for sampled ones, and once a run has noted it."""
    if session.imported_store is None:
        return None
    if not session.engine.from_main(lambda: not (run_path(session) / FILE).exists()):
        return None
    errors = foreign_errors(session, dataset)
    session.reporter.say(errors.sentence)
    return errors


def _draw(
    session: Session, dataset: GroupDataset, method: GroupMethod, step: int
) -> tuple[GroupBatch, tuple[Tensor, Tensor]]:
    """This process's share of the step's groups and its noise, in memory that is fast to copy to the device."""
    recipe, engine, seed = session.recipe, session.engine, session.recipe.train_seed
    batch = dataset.draw(step, groups=recipe.train.groups_per_step, seed=seed).share(engine.rank, engine.world)
    sigma, noise = draw_noise(batch, method, seed=seed)
    if engine.device.type == "cuda":
        return replace(batch, latents=batch.latents.pin_memory()), (sigma.pin_memory(), noise.pin_memory())
    return batch, (sigma, noise)


def _hear_stop(session: Session, micro: MicroBatch) -> None:
    """Abandon the step if the user asked to stop: a large one takes minutes, and clusters do not wait so long.

    Several processes must agree, so they look only where all are at the same place: between backward passes. Without
    gradient one may compute fewer micro-batches than another, because it has some of the errors. On trial one may run
    out of memory.
    """
    engine, stop = session.engine, session.stop
    alike = torch.is_grad_enabled() and not micro.on_trial
    if stop.requested if engine.world == 1 else alike and engine.hear(stop):
        raise StepAbandoned


def _left_out(dataset: GroupDataset) -> str:
    """How many groups the training leaves out, and why."""
    counts = dataset.counts
    reasons = {
        f"with no spread of rewards above {dataset.min_spread or 0:g}": counts.no_spread,
        "with too few scored images": counts.too_few_scores,
    }
    left_out = ", ".join(f"{count} {why}" for why, count in reasons.items() if count)
    whole = f"; {counts.whole} with fewer than {dataset.k} scored images are drawn whole" if counts.whole else ""
    return f"{counts.eligible} of {counts.total} groups can be trained on; left out: {left_out or 'none'}{whole}"


def averages(engine: Engine, metrics: dict[str, Tensor]) -> dict[str, float]:
    """Means over the processes, in one message.

    They are exact for means over groups; a share of pairs (``implicit_accuracy``), and means over ranks where groups
    differ in size, become means of the processes' own. A process with nothing to average has nan, which does not
    count; a loss that is nan remains so.
    """
    values = torch.stack([value.detach().float() for value in metrics.values()])
    if engine.world > 1:
        diagnostics = torch.tensor([not name.startswith("loss") for name in metrics], device=values.device)
        absent = values.isnan() & diagnostics
        total, count = engine.sum(torch.stack([values.masked_fill(absent, 0), (~absent).float()]))
        values = total / count
    means = values.tolist()
    return dict(zip(metrics, means, strict=True))
