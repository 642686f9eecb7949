"""Devices and processes, through accelerate, which only this file imports: one process or many run the same code."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Never

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gdro_cli.errors import EndedElsewhere, Interrupted, PrerequisiteError, UserError, is_out_of_memory
from gdro_cli.runtime.interrupt import StopFlag
from gdro_cli.runtime.process_group import ProcessGroup
from gdro_cli.runtime.sharding import shard_frozen

PATIENCE = timedelta(hours=6)
"""How long processes wait for each other: longer than any one turn, or anything that the main process does alone."""

TRANSFER = timedelta(minutes=30)
"""How long a message between GPUs may take. NCCL does not see that a process is gone; it ends the others after this."""

_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
"""Variables by which accelerate's launcher requests a way to share a model. This tool uses none of them."""

_SHOWN = 160
"""Characters of another library's error that a message shows."""


class Engine(ProcessGroup):
    """One process's view of the job; made by ``make_engine``.

    The processes share the groups of a step and sum their gradients. So a step of W processes equals, up to rounding,
    the step of one process that takes all groups. Work that differs between processes is done inside ``together`` (or
    what is built on it, see ``ProcessGroup``), so that a failure or a stop in one of them ends them all.
    """

    def __init__(self, accelerator: Any, *, tracked: bool, waiting: Any = None) -> None:
        self._accelerator = accelerator
        self._tracked = tracked
        self._waiting = waiting
        """A gloo group for objects, flags and waits, where the tensors go through another backend (NCCL)."""

    @property
    def device(self) -> torch.device:
        """This process's device."""
        device: torch.device = self._accelerator.device
        return device

    def peak_gigabytes(self) -> float | None:
        """The most memory, in 1e9 bytes, that tensors took on this process's GPU since the last call; None on a CPU."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(self.device) / 1e9
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def room(self, share: float) -> int | None:
        """Bytes of a share of this process's GPU, less what other programs have taken; None on a CPU."""
        if self.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        return int(share * total) - (total - free - torch.cuda.memory_reserved(self.device))

    @property
    def rank(self) -> int:
        """This process's number, 0 .. world - 1."""
        return int(self._accelerator.process_index)

    @property
    def world(self) -> int:
        """The number of processes."""
        return int(self._accelerator.num_processes)

    @property
    def local_world(self) -> int:
        """The number of processes on this machine."""
        return min(self.world, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients of ``loss``."""
        self._accelerator.backward(loss)

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients of parameters over all processes, in one message; a missing gradient counts as zero.

        Every process has the whole adapter, even where the base is sharded; this keeps the copies equal.
        """
        if self.world == 1:
            return
        trained = [p for p in parameters if p.requires_grad]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = torch.cat([part.flatten().float() for part in parts])
        total = self.sum(flat)
        for parameter, part in zip(trained, total.split([p.numel() for p in trained]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)

    def sum(self, values: Tensor) -> Tensor:
        """Add a tensor over all processes."""
        with _connection():
            self._meet()
            total: Tensor = self._accelerator.reduce(values, reduction="sum")
        return total

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return int(max(self.gather_objects([number])))

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Join tensors [n, ...], of the same shape in all processes, into [world * n, ...] in order of rank."""
        with _connection():
            self._meet()
            joined: Tensor = self._accelerator.gather(rows)
        return joined

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; the same answer in all of them."""
        if self.world == 1:
            return flag
        number = torch.tensor(float(flag))
        with _connection():
            torch.distributed.all_reduce(number, group=self._waiting)
        return bool(number > 0)

    def hear(self, stop: StopFlag) -> bool:
        """Whether a stop was requested in any process; the same answer in all of them."""
        requested = self.any(stop.requested)
        if requested:  # never cleared: a signal may have set this process's flag since
            stop.requested = True
        return requested

    def stop_together(self, message: str) -> Never:
        """Stop here; all processes must call it.

        Raises:
            Interrupted: always, in the main process, which reports the message.
            EndedElsewhere: in the others.
        """
        if self.is_main:
            raise Interrupted(message)
        raise EndedElsewhere(exit_code=Interrupted.exit_code)

    def clip(self, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> float:
        """Scale gradients down to a total norm of at most ``max_norm``; returns the norm before."""
        return float(self._accelerator.clip_grad_norm_(list(parameters), max_norm))

    def gather_objects(self, items: list[Any]) -> list[Any]:
        """Join the lists of all processes in order of rank; every process gets the result."""
        if self.world == 1:
            return list(items)
        lists: list[Any] = [None] * self.world
        with _connection():
            torch.distributed.all_gather_object(lists, list(items), group=self._waiting)
        return [item for part in lists for item in part]

    def _meet(self) -> None:
        """Wait for all processes where gloo sees that one is gone, before a message through a backend that does not."""
        if self._waiting is not None:
            torch.distributed.all_reduce(torch.zeros(1), group=self._waiting)

    def shard(self, module: nn.Module) -> nn.Module:
        """Move a frozen module to the devices, a part of each layer to each process (FSDP).

        From then on each forward pass takes all processes, so all of them must make the same number of passes.
        """
        return shard_frozen(module, self.device) if self.world > 1 else module.to(self.device)

    def start_trackers(self, settings: Mapping[str, str | int]) -> None:
        """Open the trackers, if there are any, with the run's settings."""
        if self._tracked:
            self._accelerator.init_trackers("gdro", config=dict(settings))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Send numbers to the trackers, if there are any."""
        if self._tracked:
            self._accelerator.log(dict(numbers), step=step)

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Send an image file to the trackers that take images: tensorboard, trackio and wandb."""
        for tracker in self._accelerator.trackers if self._tracked else ():
            _log_image(tracker, name, path, step)

    def close_trackers(self) -> None:
        """Close the trackers, if there are any."""
        for tracker in self._accelerator.trackers if self._tracked else ():
            tracker.finish()

    def end(self, *, failed: bool = False) -> None:
        """Leave the process group; call it last. A thread of gloo that outlives the interpreter aborts the process.

        ``failed``: leave only gloo's group, since NCCL may wait for a process that is gone.
        """
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group(self._waiting if failed else None)
        self._waiting = None  # a group ends when nothing refers to it
        _waiting_group.cache_clear()


def _log_image(tracker: Any, name: str, path: Path, step: int) -> None:
    if tracker.name == "trackio":  # for which accelerate has no method
        import trackio

        tracker.log({name: trackio.Image(path)}, step=step)
    elif tracker.name in ("tensorboard", "wandb"):
        with Image.open(path) as file:
            image = file.convert("RGB")
        if tracker.name == "wandb":
            tracker.log_images({name: [image]}, step=step)
        else:
            tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")


@contextmanager
def _connection() -> Iterator[None]:
    """Turn a failed message to the other processes, mostly because one of them is gone, into one sentence."""
    try:
        yield
    except RuntimeError as error:  # what every backend raises
        if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
            raise  # this process's own
        reason = (str(error).splitlines() or [""])[0][:_SHOWN]
        raise EndedElsewhere(
            "this process ends because it has lost the others; if one of them says why, that is the reason"
            f" ({reason}): run the same command again to continue"
        ) from error


def make_engine(*, trackers: Sequence[str] = (), out: Path | None = None, cpu: bool = False) -> Engine:
    """Join the job that accelerate launched, or be a job of one process.

    Args:
        trackers: names that accelerate knows, e.g. ``tensorboard``, ``wandb``, ``trackio``.
        out: folder for trackers that write files.
        cpu: stay off the GPUs.

    Raises:
        UserError: an unknown tracker, a launcher that wants to share the model, or variables left over from another
            launcher.
        PrerequisiteError: a tracker's package is not installed.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    _check_trackers(trackers)
    _check_launcher()
    if "WORLD_SIZE" in os.environ:
        import_module("torch.distributed.nn")  # imported later, its default arguments would keep the group for ever
    cpu = cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(
        mixed_precision="no",  # models have their own
        # without it, and without GPUs, accelerate treats each process as the only one
        cpu=cpu,
        log_with=list(trackers) or None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE if cpu else TRANSFER)],
        project_dir=None if out is None else str(out),
    )
    # A launcher's setting would divide every loss, but a step here has its whole gradient at once.
    accelerator.gradient_accumulation_steps = 1
    waiting = None if cpu or accelerator.num_processes == 1 else _waiting_group()
    return Engine(accelerator, tracked=bool(trackers), waiting=waiting)


@cache
def _waiting_group() -> Any:
    """One for all engines of this process, as accelerate's own group."""
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def _check_launcher() -> None:
    """Refuse a launcher that shares the model itself, and variables left over from one that did not start us."""
    from accelerate.utils import parse_flag_from_env

    for name, method in _SHARDING.items():
        if parse_flag_from_env(name):
            raise UserError(
                f"the launcher requests {method} ({name}), which gdro does not use: launch plain processes"
                " (accelerate launch --multi_gpu), and share a large model with model.sharding=fsdp"
            )
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if os.environ.get("WORLD_SIZE", "1") != "1" and missing:  # would wait for processes that do not exist
        raise UserError(
            f"the environment variable WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the same launcher did not set"
            f" {', '.join(missing)}: `unset WORLD_SIZE` if no launcher has started this process, or start it with"
            " --num-processes N or accelerate launch"
        )


def _check_trackers(names: Sequence[str]) -> None:
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    supported = {member.value for member in LoggerType if member is not LoggerType.ALL}
    installed = {tracker.value for tracker in get_available_trackers()}
    for name in names:
        if name not in supported:
            raise UserError(f"train.trackers names {name}: choose from {', '.join(sorted(supported))}")
        if name not in installed:
            raise PrerequisiteError(
                f"tracker {name} is not installed: `pip install {name}` or drop it from train.trackers"
                " (docs/quickstart.md#watching-a-training)"
            )
