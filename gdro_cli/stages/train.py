"""Stage ``train``: align the adapter's implicit rewards with the stored explicit ones, fully offline.

What differs from the paper (arXiv 2601.02036): the reference is the same transformer with its adapter off, never a
second copy; the group gradient may be computed in two passes, which is exact and needs the memory of one micro-batch;
sigma and noise are drawn from named streams, so a resumed run continues bit-exactly on the CPU. Everything else follows
the recipe, and the recipe's header says where its numbers come from.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdro_cli.config.base import digest
from gdro_cli.config.recipe import Recipe
from gdro_cli.config.sections import TrainSection
from gdro_cli.core.losses import LossOutput
from gdro_cli.data.dataset import GroupBatch, GroupDataset
from gdro_cli.errors import StoreError, UserError
from gdro_cli.models.adapters import Ema, attach_lora, load_lora_state, lora_state, reference, save_lora
from gdro_cli.models.base import FlowModel
from gdro_cli.runtime.checkpoint import (
    flatten_optimizer,
    latest_checkpoint,
    load_checkpoint,
    restore_optimizer,
    save_checkpoint,
)
from gdro_cli.runtime.distributed import Engine, Precision, make_engine
from gdro_cli.runtime.environment import environment
from gdro_cli.runtime.interrupt import STOPPING, StopFlag
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.gradient import GroupGradient, loss_arguments, noisy_groups
from gdro_cli.stages.inputs import make_inputs, open_inputs, run_inputs
from gdro_cli.stages.outcome import STOPPED, best_folder, evaluated_weights, keep_if_best
from gdro_cli.stages.rewards import measures, trained_detail
from gdro_cli.stages.validate import Validation
from gdro_cli.stages.workspace import image_size, open_model, runs_folder

# Keys that change how fast or how verbosely a run goes, or what is done after it, but not what it learns.
_NOT_LEARNT_FROM: dict[str, Any] = {
    "description": True,
    "ablation": True,
    "judge": True,
    "eval": True,
    "prompts": {"eval", "validation"},
    "sample": {"batch_size", "prompts_per_shard", "image_format"},
    "reward": {"workers", "max_failed_share"},
    "train": {"checkpoint_every", "keep_checkpoints", "log_every", "eval_every", "trackers"},
}


# The few metrics that the progress line has room for, and their names there.
SHOWN = {"loss": "loss", "implicit_accuracy": "accuracy", "top1_error_gap": "top1_gap"}


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run."""

    run: RunFolder
    steps: int
    resumed_from: int

    @property
    def summary(self) -> dict[str, str]:
        """What the command line shows."""
        last = latest_checkpoint(self.run.path)
        step = self.steps if last is None else load_checkpoint(last).step
        rows = {"run": str(self.run.path), "steps": str(step)}
        if self.resumed_from == self.steps:
            rows["training"] = "was finished already"
        elif self.resumed_from:
            rows["training"] = f"continued from step {self.resumed_from}"
        points = [row for row in self.run.metrics() if row.get("kind") == "validation"]
        points = [row for row in points if row["protocol"] == points[-1]["protocol"]]
        for name in ("reward", "corrected"):
            if len(points) > 1 and name in points[-1]:
                rows[f"validation {name}"] = f"{points[0][name]:.3f} -> {points[-1][name]:.3f}"
        best = latest_checkpoint(best_folder(self.run))
        if best is not None:
            rows["weights kept"] = f"those of step {load_checkpoint(best).step}, the best evaluation point"
        if (self.run.path / STOPPED).is_file():
            rows["training"] = "ended early, the pictures had collapsed (stopped.json)"
        rows["adapter"] = str(self.run.path / "pytorch_lora_weights.safetensors")
        return rows


def run(recipe: Recipe, workspace: Path, reporter: Reporter) -> TrainResult:
    """Train the adapter of ``recipe``; makes missing samples and scores first and resumes an interrupted run.

    Raises:
        UserError: the recipe cannot be trained as it is.
        PrerequisiteError: the model or the reward engine is missing.
        StoreError: a store, score table, checkpoint or run is damaged or belongs to something else.
        Interrupted: stopped by the user after a checkpoint.
    """
    engine = make_engine(trackers=recipe.train.trackers, out=workspace, precision=precision(recipe))
    with StopFlag(on_request=lambda: reporter.say(STOPPING)) as stop:
        model = open_model(recipe, device=str(engine.device))
        dataset, inputs = training_set(recipe, workspace, model, engine, reporter, stop)
        folder = open_run(recipe, workspace, inputs)
        engine.start_trackers({"recipe": recipe.name, "run": folder.path.name, "seed": recipe.train_seed})
        with folder.lock() if engine.is_main else nullcontext():
            trainer = Trainer(recipe, model, dataset, folder, engine)
            start = trainer.resume()
            with ExitStack() as stack:
                watch = engine.is_main and recipe.train.eval_every > 0 and not has_ended(folder, recipe, start)
                train_loop(
                    trainer, Validation.open(recipe, model, folder.path, stack) if watch else None, reporter, stop
                )
            if engine.is_main:
                folder.write_json("resolved.json", recipe.resolved())
                trainer.export()
        engine.end()
    return TrainResult(folder, recipe.train.steps, start)


def training_set(
    recipe: Recipe, workspace: Path, model: FlowModel, engine: Engine, reporter: Reporter, stop: StopFlag
) -> tuple[GroupDataset, dict[str, str]]:
    """Make what is missing of store and scores, then load the training groups into memory."""
    store, table = open_inputs(recipe, workspace, model)
    if engine.is_main:
        make_inputs(recipe, workspace, model, reporter, stop)
    engine.barrier()
    model.release_encoders()
    model.release_decoder()
    method, detail = recipe.method, trained_detail(recipe)
    dataset = GroupDataset.load(store, table, k=method.k, min_spread=method.min_spread, detail=detail)
    if recipe.train.shuffle_rewards:
        dataset = dataset.with_shuffled_rewards(recipe.train_seed)
    return dataset, run_inputs(store, table)


def precision(recipe: Recipe) -> Precision:
    """What matrix products are computed in: bfloat16 on CUDA unless the recipe says otherwise, float32 elsewhere."""
    return "bf16" if torch.cuda.is_available() and recipe.model.dtype in ("auto", "bfloat16") else "no"


def learnt_from(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that its training depends on, as JSON."""
    whole = recipe.model_dump(mode="json")
    kept = recipe.model_dump(mode="json", exclude=_NOT_LEARNT_FROM)
    for kind in ("ocr", "geneval"):
        if kind != recipe.reward.kind:
            kept["reward"].pop(kind)
    if recipe.train_seed == recipe.seed:  # named or not, it is the same training
        kept["train"].pop("seed")
    if recipe.train.stop_on_collapse:  # then the evaluation points decide where the training ends
        unseen = ("checkpoint", "images_per_prompt", "grid_prompts")  # `gdro eval` alone reads them
        kept |= {"judge": whole["judge"], "eval": {k: v for k, v in whole["eval"].items() if k not in unseen}}
        kept["prompts"]["validation"] = whole["prompts"]["validation"]
        kept["train"]["eval_every"] = whole["train"]["eval_every"]
    return kept


def run_path(recipe: Recipe, workspace: Path, inputs: dict[str, str]) -> Path:
    """Where the run of a recipe lies: named by all that its training depends on."""
    return runs_folder(workspace) / f"{recipe.name}-{digest({'recipe': learnt_from(recipe), 'inputs': inputs})}"


def open_run(recipe: Recipe, workspace: Path, inputs: dict[str, str]) -> RunFolder:
    """Make or open the run folder of a recipe."""
    return RunFolder.create_or_open(
        run_path(recipe, workspace, inputs),
        recipe=learnt_from(recipe),
        inputs=inputs,
        environment=environment(),
    )


def find_run(recipe: Recipe, workspace: Path, inputs: dict[str, str]) -> RunFolder | None:
    """The run folder of a recipe, if it has been made."""
    return open_run(recipe, workspace, inputs) if run_path(recipe, workspace, inputs).exists() else None


def attach_adapter(recipe: Recipe, model: FlowModel) -> list[torch.nn.Parameter]:
    """Give the model the recipe's adapter, freshly initialised, and return its parameters."""
    lora = recipe.train.lora
    return attach_lora(
        model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, rslora=lora.rslora, seed=recipe.train_seed
    )


class Trainer:
    """Adapter, optimizer and averages of one run, stepped, saved and restored together."""

    def __init__(
        self, recipe: Recipe, model: FlowModel, dataset: GroupDataset, folder: RunFolder, engine: Engine
    ) -> None:
        section = recipe.train
        if section.groups_per_step % engine.world:
            raise UserError(
                f"train.groups_per_step is {section.groups_per_step}, which {engine.world} processes cannot share"
                " equally: choose a multiple"
            )
        self.recipe, self.model, self.dataset = recipe, model, dataset
        self.folder, self.engine = folder, engine
        self.parameters = attach_adapter(recipe, model)
        if section.gradient_checkpointing:
            model.transformer.enable_gradient_checkpointing()  # type: ignore[operator]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=section.lr, betas=section.adam_betas, weight_decay=section.weight_decay
        )
        self.ema = Ema(self.parameters, section.ema.rate, section.ema.max_decay)
        self.step = 0
        self.collapse: dict[str, Any] | None = None
        """Where and why the training is to end early."""
        images = section.groups_per_step // engine.world * recipe.method.k
        fits = section.micro_batch is None or images <= section.micro_batch
        self.gradient = GroupGradient(
            model=model,
            loss=loss_arguments(recipe.method),
            reduction=recipe.method.reduction,
            guidance=recipe.sample.guidance,
            size=image_size(recipe, model),
            micro_batch=section.micro_batch,
            one_pass=section.group_gradient == "one_pass" or (section.group_gradient == "auto" and fits),
            reference=lambda: reference(model),
            autocast=engine.autocast,
            backward=lambda loss: engine.backward(loss / engine.world),  # gradients are summed over processes
        )

    def draw(self) -> GroupBatch:
        """This process's share of the groups of the present step."""
        section = self.recipe.train
        batch = self.dataset.draw(self.step, groups=section.groups_per_step, seed=self.recipe.train_seed)
        return batch.share(self.engine.rank, self.engine.world)

    def update(self, batch: GroupBatch) -> tuple[LossOutput, float]:
        """One optimizer step; returns the loss and the gradient's norm before clipping."""
        output = self.gradient(noisy_groups(self.model, batch, self.recipe.method, seed=self.recipe.train_seed))
        self.engine.sum_gradients(self.parameters)
        norm = self.engine.clip(self.parameters, self.recipe.train.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.train, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        self.step += 1
        return output, norm

    def validate(self, validation: Validation, reporter: Reporter) -> bool:
        """Measure an evaluation point, log it, and keep its weights if it is the best.

        Returns whether the training is to end here: the recipe asks for it, and the pictures have collapsed.
        """
        if validation.base is None:
            validation.know_base(lambda: reference(self.model))
        with self.ema.applied() if self.recipe.eval.weights == "ema" else nullcontext():
            row, found = validation.measure(self.step)
        self.folder.append_metrics({"kind": "validation", "step": self.step, **row})
        numbers = {f"validation/{name}": value for name, value in row.items() if not isinstance(value, str)}
        self.engine.log(numbers, self.step)
        headline = measures(self.recipe)[0].name
        more = "".join(
            f" {name} {row[name]:.3f}," for name in (headline, "u", "corrected") if name in row and name != "reward"
        )
        reporter.say(
            f"step {self.step}: validation reward {row['reward']:.3f} [{row['low']:.3f}, {row['high']:.3f}],"
            f"{more} {row['images']} images" + ("" if found is None else f", {found.level}")
        )
        if self.step and validation.is_fair(row):
            tensors = {"adapter": lora_state(self.model), "ema": self.ema.state()}
            measure = headline if validation.judges is None else "corrected"
            keep_if_best(self.folder, {"step": self.step, **row}, measure=measure, tensors=tensors)
        if not self.recipe.train.stop_on_collapse or found is None or found.level != "collapsed":
            return False
        self.collapse = {"step": self.step, "reasons": list(found.reasons)}
        reporter.say(f"step {self.step}: the training ends here, the pictures have collapsed: {found.reasons[0]}")
        return True

    def save(self) -> None:
        """Write a checkpoint of the present step, with the adapter in diffusers' format beside it."""
        if not self.engine.is_main:
            return
        tensors, state = flatten_optimizer(self.optimizer)

        def add_adapters(folder: Path) -> None:
            save_lora(self.model, folder / "raw")
            with self.ema.applied():
                save_lora(self.model, folder / "ema")

        save_checkpoint(
            self.folder.path,
            self.step,
            tensors={"adapter": lora_state(self.model), "ema": self.ema.state(), "optimizer": tensors},
            state={"optimizer": state},
            extra=add_adapters,
            keep=self.recipe.train.keep_checkpoints,
        )

    def resume(self) -> int:
        """Restore the newest checkpoint, if there is one, and return its step."""
        path = latest_checkpoint(self.folder.path)
        if path is not None:
            checkpoint = load_checkpoint(path)
            self.step = checkpoint.step
            load_lora_state(self.model, checkpoint.tensors["adapter"])
            self.ema.load(checkpoint.tensors["ema"])
            restore_optimizer(self.optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
        if self.engine.is_main:
            self.folder.truncate_metrics(after_step=-1 if path is None else self.step)
        return self.step

    def export(self) -> None:
        """Put the adapter that is evaluated where ``pipe.load_lora_weights(run)`` finds it."""
        weights = evaluated_weights(self.folder, self.recipe)
        if weights is None:
            return
        load_lora_state(self.model, weights.adapter)
        self.ema.load(weights.ema)
        with self.ema.applied() if self.recipe.eval.weights == "ema" else nullcontext():
            save_lora(self.model, self.folder.path)


def learning_rate(section: TrainSection, step: int) -> float:
    """Learning rate of step ``step`` (from 0)."""
    if step < section.warmup_steps:
        return section.lr * (step + 1) / section.warmup_steps
    course = (step - section.warmup_steps) / max(1, section.steps - section.warmup_steps)
    if section.lr_schedule == "linear":
        return section.lr * (1 - course)
    if section.lr_schedule == "cosine":
        return section.lr * 0.5 * (1 + math.cos(math.pi * course))
    return section.lr


def has_ended(folder: RunFolder, recipe: Recipe, step: int) -> bool:
    """Whether a run that stands at ``step`` has nothing left to do."""
    return step >= recipe.train.steps or (folder.path / STOPPED).is_file()


def train_loop(trainer: Trainer, validation: Validation | None, reporter: Reporter, stop: StopFlag) -> None:
    """All remaining steps: draw groups, one update, log; now and then validate and save."""
    section, engine, folder = trainer.recipe.train, trainer.engine, trainer.folder
    if has_ended(folder, trainer.recipe, trainer.step):
        return
    if validation is not None and trainer.step == 0:
        trainer.validate(validation, reporter)
    with reporter.track("training", total=section.steps, unit="steps", done=trainer.step) as progress:
        while trainer.step < section.steps:
            began = time.perf_counter()
            output, norm = trainer.update(trainer.draw())
            step, last = trainer.step, trainer.step == section.steps
            numbers = averages(engine, {"loss": output.loss, **output.metrics})
            if not math.isfinite(numbers["loss"]) or not math.isfinite(norm):
                raise StoreError(
                    f"the loss became {numbers['loss']} at step {step} of {folder.path}: lower train.lr or method.beta;"
                    " the last checkpoint is kept"
                )
            if engine.is_main and (step % section.log_every == 0 or last):
                numbers |= {"grad_norm": norm, "lr": trainer.optimizer.param_groups[0]["lr"]}
                known = {name: value for name, value in numbers.items() if math.isfinite(value)}
                folder.append_metrics({"kind": "train", "step": step, **known, "seconds": time.perf_counter() - began})
                engine.log(known, step)
            progress.advance(1, **{label: numbers[name] for name, label in SHOWN.items()})
            point = validation is not None and (step % section.eval_every == 0 or last)
            ended = engine.any(point and validation is not None and trainer.validate(validation, reporter))
            stop.requested = engine.any(stop.requested)
            if step % section.checkpoint_every == 0 or last or ended or stop.requested:
                trainer.save()
            if ended:
                if trainer.collapse is not None:
                    folder.write_json(STOPPED, trainer.collapse)  # only now that the step's checkpoint is there
                return
            stop.check(f"stopped after step {step} of {section.steps}; run the same command again to go on")


def averages(engine: Engine, metrics: dict[str, Tensor]) -> dict[str, float]:
    """Means over the processes, in one message.

    Exact for everything that is a mean over groups; a share of pairs (``implicit_accuracy``) becomes the mean of the
    processes' shares.
    """
    values = torch.stack([value.detach().float() for value in metrics.values()])
    means = (engine.sum(values) / engine.world if engine.world > 1 else values).tolist()
    return dict(zip(metrics, means, strict=True))
