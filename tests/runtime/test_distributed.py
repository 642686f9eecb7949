"""The engine in one process, and in two on the CPU, with the same sums and gradients."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gdro_cli.errors import EndedElsewhere, Interrupted, PrerequisiteError, UserError
from gdro_cli.runtime.distributed import _connection, make_engine
from gdro_cli.runtime.interrupt import StopFlag

pytestmark = pytest.mark.slow

WORK = """
import json, os, sys, torch
from torch import nn
from gdro_cli.runtime.distributed import make_engine

engine = make_engine(cpu=True)
torch.manual_seed(0)
layer, unused = nn.Linear(3, 2), nn.Parameter(torch.ones(2))
groups = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(5)]
for group in engine.share(groups):
    engine.backward(layer(group).square().mean() / len(groups))
parameters = [*layer.parameters(), unused]
engine.sum_gradients(parameters)
norm = engine.clip(parameters, 0.1)
names = engine.gather_objects([f"{engine.rank}:{i}" for i in range(engine.rank + 1)])
total = engine.sum(torch.tensor([1.0, engine.rank]))
result = {"world": engine.world, "main": engine.is_main, "norm": norm, "names": names, "total": total.tolist(),
          "grad": layer.weight.grad.tolist(), "unused": None if unused.grad is None else unused.grad.tolist()}
with open(f"{sys.argv[1]}/{engine.rank}.json", "w") as stream:
    json.dump(result, stream)
engine.end()
"""


DEAF = """
import datetime, json, os, sys, time, torch
torch.accelerator.is_available = lambda: True  # accelerate, which is set to the CPU, does not ask this
from gdro_cli.errors import EndedElsewhere
from gdro_cli.runtime import distributed

distributed.TRANSFER = datetime.timedelta(seconds=4)
engine = distributed.make_engine()
late = lambda: time.sleep(8 * engine.rank)
late()
names = engine.gather_objects([engine.rank])
late()
heard = engine.any(engine.rank == 1)
late()
total = engine.sum(torch.tensor([1.0])).tolist()
late()
rows = engine.gather_rows(torch.tensor([1.0])).tolist()
result = {"names": names, "heard": heard, "total": total, "rows": rows}
if engine.rank == 0:
    engine._accelerator.reduce = lambda *_, **__: time.sleep(1000)  # what NCCL does without its other end
    try:
        engine.sum(torch.tensor([1.0]))
    except EndedElsewhere as error:
        result["end"] = str(error)
with open(f"{sys.argv[1]}/{engine.rank}.json", "w") as stream:
    json.dump(result, stream)
os._exit(0)
"""
"""Two gloo groups: the one in place of NCCL gives up after 4 seconds, and then never notices a lost process."""


FAILED = """
import json, sys, torch
from pathlib import Path
from gdro_cli.config.load import load_recipe
from gdro_cli.errors import EndedElsewhere, UserError
from gdro_cli.stages.setup.session import Session

def gloo():
    return any(path.read_text().strip() == "pt_gloo_runloop" for path in Path("/proc/self/task").glob("*/comm"))

session = Session(load_recipe("ocr"), Path(sys.argv[1]))
rank, before = session.engine.rank, torch.distributed.is_initialized()
import torch.distributed.nn  # as models do: its functions have the group of this moment as default arguments
try:
    with session, session.engine.together():
        if rank == 1:
            raise UserError("one process fails")
except (UserError, EndedElsewhere):
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps([before, gloo()]))
"""


ENDED = """
import json, sys, torch
from pathlib import Path
torch.accelerator.is_available = lambda: True  # as in DEAF
from gdro_cli.runtime.distributed import make_engine

def gloo():
    return sum(path.read_text().strip() == "pt_gloo_runloop" for path in Path("/proc/self/task").glob("*/comm"))

engine = make_engine()
engine.gather_objects([engine.rank])
engine.end(failed=sys.argv[1].endswith("failed"))
Path(sys.argv[1], f"{engine.rank}.json").write_text(json.dumps(gloo()))
"""
"""A group for NCCL's work and one for long waits, with two threads each."""


def run_two(folder: Path, work: str = WORK) -> list[Any]:
    """Start the work twice, as a launcher would, and read the result of each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        **{"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    }
    children = []
    try:
        for rank in ("0", "1"):
            environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
            children.append(subprocess.Popen([sys.executable, "-c", work, str(folder)], env=environment))
        assert [child.wait(timeout=240) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
            child.wait()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_two_processes_take_the_step_of_one(tmp_path: Path) -> None:
    """Against torch alone: the mean over five groups, three in one process and two in the other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
    groups = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    torch.stack([layer(group).square().mean() for group in groups]).mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(layer.parameters(), 0.1).item()
    assert norm > 0.1 and layer.weight.grad is not None

    first, second = run_two(tmp_path)
    assert (first["world"], second["world"]) == (2, 2) and (first["main"], second["main"]) == (True, False)
    for result in (first, second):
        torch.testing.assert_close(torch.tensor(result["grad"]), layer.weight.grad)
        assert result["norm"] == pytest.approx(norm)
        assert result["names"] == ["0:0", "1:0", "1:1"] and result["total"] == [2.0, 1.0]
        assert result["unused"] == [0.0, 0.0]


def test_long_waits_and_lost_processes_are_no_matter_of_nccl(tmp_path: Path) -> None:
    first, second = run_two(tmp_path, DEAF)
    assert "lost the others" in first.pop("end")
    assert first == second == {"names": [0, 1], "heard": True, "total": [2.0], "rows": [1.0, 1.0]}


def test_processes_that_fail_leave_their_group(tmp_path: Path) -> None:
    """If a thread of gloo frees a tensor while the interpreter exits, the process aborts and its exit code is lost."""
    assert run_two(tmp_path, FAILED) == [[True, False]] * 2


@pytest.mark.parametrize(("end", "left"), [("finished", 0), ("failed", 2)])
def test_the_group_for_long_waits_ends(end: str, left: int, tmp_path: Path) -> None:
    """After a failure the other one is left alone, since NCCL may wait for a process that is gone."""
    (tmp_path / end).mkdir()
    assert run_two(tmp_path / end, ENDED) == [left, left]


def test_one_process_works_alone() -> None:
    engine = make_engine(cpu=True)
    assert engine.gather_objects(["a"]) == ["a"]
    assert (engine.rank, engine.world, engine.is_main) == (0, 1, True) and engine.device.type == "cpu"
    assert engine.share(["a", "b", "c"]) == ["a", "b", "c"]
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    engine.backward(layer(torch.tensor([[3.0, 4.0]])).sum())
    # d loss / d (weight, bias) = (3, 4, 1), whose norm is the root of 26.
    assert engine.clip(layer.parameters(), 100.0) == pytest.approx(26**0.5)
    before = layer.bias.item()
    optimizer.step()
    assert layer.bias.item() == pytest.approx(before - 0.5)


def test_a_stop_during_an_agreement_counts_at_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that comes while the processes agree sets the flag, but does not change the answer that all have."""
    engine = make_engine(cpu=True)
    agree, flags = engine.any, []

    def agree_with_signal(flag: bool) -> bool:
        if not flags:
            flags.append(flag)
            os.kill(os.getpid(), signal.SIGTERM)  # handled as soon as this returns
        return agree(flag)

    monkeypatch.setattr(engine, "any", agree_with_signal)
    with StopFlag() as stop:
        assert not engine.hear(stop)
        assert stop.requested
        assert engine.hear(stop)
        with pytest.raises(Interrupted, match="kept"):
            engine.stop_together("kept")


def test_trackers_are_checked_by_name() -> None:
    with pytest.raises(UserError, match="names tensorbord: choose from .*tensorboard"):
        make_engine(trackers=["tensorbord"], cpu=True)
    from accelerate.tracking import get_available_trackers

    missing = [n for n in ("aim", "clearml", "dvclive") if n not in {str(t.value) for t in get_available_trackers()}]
    with pytest.raises(PrerequisiteError, match=f"pip install {missing[0]}"):
        make_engine(trackers=missing[:1], cpu=True)


def test_a_launchers_settings_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    engine = make_engine(cpu=True)
    weight = nn.Parameter(torch.ones(1))
    engine.backward(3 * weight.sum())
    assert weight.grad is not None and weight.grad.item() == 3


def test_variables_left_over_from_a_launcher_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "a")
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but .* did not set RANK, MASTER_PORT: `unset WORLD_SIZE`"):
        make_engine(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert make_engine(cpu=True).world == 1


@pytest.mark.parametrize(("variable", "what"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed")])
def test_a_launcher_that_shares_the_model_is_refused(variable: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(UserError, match=f"the launcher requests {what} .*model.sharding=fsdp"):
        make_engine(cpu=True)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("[gloo] Connection closed by peer"), EndedElsewhere),
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError),
        (RuntimeError("NCCL Error 1: unhandled cuda error, Cuda failure 2 'out of memory'"), RuntimeError),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), torch.AcceleratorError),
    ],
)
def test_only_a_lost_connection_is_reported_as_one(error: Exception, raised: type[Exception]) -> None:
    with pytest.raises(raised) as found, _connection():
        raise error
    assert raised is EndedElsewhere or found.value is error
