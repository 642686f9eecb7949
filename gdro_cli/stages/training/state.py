"""What a training changes: adapter, optimizer, average and step. It can be saved, restored and exported."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from gdro_cli.files import storage_errors
from gdro_cli.models.adapters import Ema, load_lora_state, lora_state, save_lora
from gdro_cli.runtime.checkpoint import (
    flatten_optimizer,
    latest_checkpoint,
    load_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from gdro_cli.runtime.optimizer import make_optimizer
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.runs.finished_run import write_adapter_note
from gdro_cli.stages.runs.weights import (
    STOPPED,
    UNMEASURED,
    early_end,
    evaluated_weights,
    forget_best_after,
)
from gdro_cli.stages.setup.model import attach_adapter
from gdro_cli.stages.setup.session import Session

_COLLAPSE = "collapse"
"""Key in a checkpoint's state: step and reasons of an early end."""


class TrainingState:
    """Adapter, optimizer and average of one run at one step."""

    def __init__(self, session: Session, folder: RunFolder) -> None:
        self.session, self.folder = session, folder
        train = session.recipe.train
        self.parameters = attach_adapter(session.recipe, session.model)
        self.optimizer = make_optimizer(
            train.optimizer, self.parameters, lr=train.lr, betas=train.adam_betas, weight_decay=train.weight_decay
        )
        self.ema = Ema(self.parameters, train.ema.rate, train.ema.max_decay)
        self.step = 0
        self.collapse: dict[str, Any] | None = None
        """Step and reasons of an early end, in the main process only."""
        self.unmeasured = False
        """Whether the evaluation point of this step, which has a checkpoint, must still be measured."""
        self.saved = -1
        """Step of the newest checkpoint."""
        self.finished = False
        """Whether nothing was left to do after ``resume``."""

    def evaluated(self) -> AbstractContextManager[object]:
        """Inside the block the adapter has the weights that the recipe evaluates."""
        return self.ema.applied() if self.session.recipe.eval.weights == "ema" else nullcontext()

    def update(self, learning_rate: float) -> float:
        """Sum the gradients over all processes and take an optimizer step; returns their norm before clipping."""
        engine = self.session.engine
        engine.sum_gradients(self.parameters)
        norm = engine.clip(self.parameters, self.session.recipe.train.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        return norm

    # -- checkpoints --------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of this step unless it has one. All processes must call it."""
        if self.saved == self.step:
            return
        with self.session.engine.together():
            if self.session.engine.is_main:
                self._write_checkpoint()
        self.saved = self.step

    def _write_checkpoint(self) -> None:
        model = self.session.model
        tensors, state = flatten_optimizer(self.optimizer)

        def add_adapters(folder: Path) -> None:
            save_lora(model, folder / "raw")
            with self.ema.applied():
                save_lora(model, folder / "ema")

        notes: dict[str, Any] = {} if self.collapse is None else {_COLLAPSE: self.collapse}
        save_checkpoint(
            self.folder.path,
            self.step,
            tensors={"adapter": lora_state(model), "ema": self.ema.state(), "optimizer": tensors},
            state={"optimizer": state, **notes, **({UNMEASURED: True} if self.unmeasured else {})},
            extra=add_adapters,
            keep=self.session.recipe.train.keep_checkpoints,
        )

    def resume(self) -> int:
        """Restore the newest checkpoint, if there is one, in all processes, and return its step."""
        engine = self.session.engine
        # Only the main process looks: another may not see the newest files of a shared disk yet.
        path = engine.from_main(lambda: latest_checkpoint(self.folder.path))
        with engine.together():
            if path is not None:
                self._restore(path)
            if engine.is_main:
                self.folder.truncate_metrics(-1 if path is None else self.step, unmeasured=self.unmeasured)
                forget_best_after(self.folder, self.step)
                self._write_early_end()
        complete = self.step >= self.session.recipe.train.steps and not self.unmeasured
        self.finished = engine.from_main(lambda: complete or early_end(self.folder.path) is not None)
        return self.step

    def _restore(self, path: Path) -> None:
        checkpoint = load_checkpoint(path, needed=("adapter", "ema", "optimizer"))
        self.step = self.saved = checkpoint.step
        self.collapse = checkpoint.state.get(_COLLAPSE)
        self.unmeasured = UNMEASURED in checkpoint.state
        load_lora_state(self.session.model, checkpoint.tensors["adapter"])
        self.ema.load(checkpoint.tensors["ema"])
        restore_optimizer(self.optimizer, checkpoint.tensors["optimizer"], checkpoint.state.get("optimizer", {}))

    # -- the end ------------------------------------------------------------------------------------------------

    def end_early(self) -> None:
        """Note that the training ends at this step, and why. All processes must call it."""
        with self.session.engine.together():
            if self.session.engine.is_main:
                self._write_early_end()

    def _write_early_end(self) -> None:
        """Make the note of an early end agree with the newest checkpoint."""
        if self.collapse is not None:
            self.folder.write_json(STOPPED, self.collapse)
        elif early_end(self.folder.path) is None:
            with storage_errors(self.folder.path):
                (self.folder.path / STOPPED).unlink(missing_ok=True)

    def export(self) -> None:
        """Write the evaluated adapter where ``pipe.load_lora_weights(run)`` looks for it, and its description."""
        weights = evaluated_weights(self.folder, self.session.recipe)
        load_lora_state(self.session.model, weights.adapter)
        self.ema.load(weights.ema)
        with self.evaluated():
            save_lora(self.session.model, self.folder.path)
        write_adapter_note(self.session, self.folder, weights)
