"""From the options of a command to a running stage: in this process, or in several through accelerate."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from gdro_cli.errors import EndedElsewhere, GdroError, Interrupted, PrerequisiteError, UserError
from gdro_cli.processes import only_gpu
from gdro_cli.runtime.terminal import is_main_process

if TYPE_CHECKING:
    from gdro_cli.config.recipe import Recipe
    from gdro_cli.runtime.progress import Reporter
    from gdro_cli.stages.setup.session import Session

Stage = Literal["import", "sample", "score", "train", "eval", "ablate"]

_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables with which a launcher describes the group to each process, beside TORCHELASTIC_*, ROLE_* and GROUP_*."""
_SAFE_POINT_SECONDS = 120
"""Time for the processes to reach a safe point after Ctrl-C before torch kills them (its default: 30)."""


@dataclass(frozen=True, slots=True)
class Job:
    """A stage with its checked recipe and its folder."""

    stage: Stage
    recipe: Recipe
    workspace: Path
    command: tuple[str, ...]
    """Arguments of ``gdro`` that start the same job."""


def prepare(
    stage: Stage,
    *,
    recipe: str,
    overrides: Sequence[str] | None,
    out: Path,
    debug: bool = False,
    run: Path | None = None,
    more: Sequence[str] = (),
) -> Job:
    """Load and check the recipe; nothing is run or written.

    Args:
        stage: the command.
        recipe: name or path of the recipe.
        overrides: ``--set``.
        out: folder of stores and runs.
        debug: whether the processes of the job print tracebacks.
        run: a run whose recipe replaces ``recipe``.
        more: options of this stage alone.

    Raises:
        UserError: the recipe cannot be used.
        StoreError: the run's recipe is missing or damaged.
    """
    from gdro_cli.config.load import load_recipe, load_resolved

    changes = tuple(part for override in overrides or () for part in ("--set", override))
    last = ("--debug",) if debug else ()
    subject = ("--recipe", recipe) if run is None else (str(run),)
    command = (stage, *subject, *changes, "--out", str(out), *more, *last)
    if run is None:
        loaded = load_recipe(recipe, overrides=overrides or ())
    else:
        loaded = load_resolved(run / "resolved.json", overrides=overrides or ())
    return Job(stage, loaded, out, command)


def several(num_processes: int) -> bool:
    """Whether this process must start others: it should be one of several, and no launcher has started it."""
    return num_processes > 1 and "WORLD_SIZE" not in os.environ


def start(job: Job) -> Session:
    """The session of the job, whose folder now exists. Raises ``UserError`` if it cannot be written to."""
    from gdro_cli.runtime.interrupt import work_begins
    from gdro_cli.runtime.progress import Reporter
    from gdro_cli.stages.setup.session import Session

    _writable(job.workspace)
    work_begins()
    return Session(job.recipe, job.workspace, Reporter(quiet=not is_main_process()))


def plain_reporter() -> Reporter:
    """A reporter without progress bars, for processes that share a terminal."""
    from rich.console import Console

    from gdro_cli.runtime.progress import Reporter

    return Reporter(Console(stderr=True, highlight=False, force_terminal=False))


def _writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {folder} is not a folder: name another one") from error
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made ({error.strerror}): name another folder") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder} cannot be written: change its permissions or name another folder")


def check_devices(num_processes: int, *, option: str) -> None:
    """Raise ``PrerequisiteError`` if this machine has GPUs, but fewer than processes."""
    import torch

    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else num_processes
    if gpus < num_processes:
        raise PrerequisiteError(
            f"{option} {num_processes} needs as many GPUs, but there are {gpus}: choose a lower number"
        )


def alone_on_its_device() -> None:
    """Take this process out of the group that ``run_in_processes`` made, and show it its own GPU only.

    It then waits for no other process, and a training in it is a training of its own.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = only_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    for name in list(os.environ):
        if name in _GROUP or name.startswith(("TORCHELASTIC_", "ROLE_", "GROUP_")):
            del os.environ[name]


def run_in_processes(job: Job, num_processes: int, *, option: str = "--num-processes") -> None:
    """Run the job in several processes of this machine; exit with the code of the first that fails."""
    import logging

    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from gdro_cli.runtime.interrupt import LAUNCHER

    _writable(job.workspace)
    os.environ[LAUNCHER] = str(os.getpid())
    check_devices(num_processes, option=option)
    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # otherwise each process would take itself for the only one
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAFE_POINT_SECONDS))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the process that fails reports it
    # --multi_gpu is accelerate's name for "several processes on this machine", with GPUs or without
    options = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    ports = ["--main_process_port", "0"]  # any free one, so that two jobs can share a machine
    arguments = [*options, *ports, "--num_processes", str(num_processes), "-m", "gdro_cli", *job.command]
    parsed = launch_command_parser().parse_args(arguments)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
        parsed.signals_to_handle = "SIGTERM,SIGINT,SIGQUIT"  # torch's default without SIGHUP
    try:
        launch_command(parsed)
    except ChildFailedError as error:
        rank, code = _cause(error.failures)
        if code > 0:
            raise typer.Exit(code) from error
        raise _killed(rank, -code) from error
    except SignalException as error:
        raise Interrupted(
            f"all processes were stopped by {error.sigval.name}: run the same command again to continue"
        ) from error


def _cause(failures: Mapping[int, Any]) -> tuple[int, int]:
    """Rank and exit code of the process that failed first.

    Torch's times are whole seconds. Within the first of them, a killed process comes before one that ended because it
    had lost another.
    """
    earliest = min(failure.timestamp for failure in failures.values())
    first = [(rank, failure.exitcode) for rank, failure in failures.items() if failure.timestamp == earliest]
    killed = [(rank, code) for rank, code in first if code < 0]
    return killed[0] if killed and first[0][1] == EndedElsewhere().exit_code else first[0]


def _killed(rank: int, number: int) -> GdroError:
    """The error for a process that a signal ended before it could report anything."""
    name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    killed = f"process {rank} of the job was killed by signal {number} ({name})"
    if number == signal.SIGKILL:
        return PrerequisiteError(
            f"{killed}, mostly because memory ran out: lower sample.batch_size or train.micro_batch or use fewer"
            " processes, and run the same command again to continue"
        )
    if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return Interrupted(f"{killed} and the others stopped with it: run the same command again to continue")
    return PrerequisiteError(
        f"{killed}, a crash inside a library or a driver: read the messages above, check that torch fits the driver"
        " (gdro env), and run the same command again to continue"
    )


def spread_cells(
    job: Job, jobs: int, *, param: Sequence[str], values: Sequence[str], seeds: int
) -> Callable[[], None] | None:
    """A function that carries out the cells of an ablation in several processes; None for one process."""
    if jobs == 1:
        return None
    swept = [part for name in param for part in ("--param", name)]
    swept += [part for text in values for part in ("--values", text)]
    command = (*job.command, *swept, "--seeds", str(seeds), "--worker")
    return lambda: run_in_processes(replace(job, command=command), jobs, option="--jobs")
