"""Checkpoints: complete or absent, every flipped byte found, optimizers restored to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gdro_cli.errors import StoreError
from gdro_cli.runtime.checkpoint import (
    flatten_optimizer,
    latest_checkpoint,
    load_checkpoint,
    mend_checkpoints,
    restore_optimizer,
    save_checkpoint,
)

TENSORS = {"lora": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)}}
STATE = {"losses": [0.1, 1 / 3], "note": "ü"}


def save(folder: Path, step: int, *, keep: int = 3) -> Path:
    def extra(path: Path) -> None:
        (path / "adapter").mkdir()
        (path / "adapter" / "weights.txt").write_text(f"step {step}")

    return save_checkpoint(folder, step, tensors=TENSORS, state=STATE, extra=extra, keep=keep)


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    assert path == tmp_path / "checkpoints" / "step-000100" == latest_checkpoint(tmp_path)
    step, tensors, state = load_checkpoint(path)
    assert step == 100 and state == STATE
    assert all(
        torch.equal(tensors["lora"][k], v) and tensors["lora"][k].dtype == v.dtype for k, v in TENSORS["lora"].items()
    )
    assert (path / "adapter" / "weights.txt").read_text() == "step 100"


def test_only_the_newest_stay(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (5, 10, 1_000_000, 15):
        save(tmp_path, step, keep=2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000015", "step-1000000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-1000000"
    save(tmp_path, 20, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000020"]
    with pytest.raises(ValueError, match="at least 1"):
        save(tmp_path, 21, keep=0)


@pytest.mark.parametrize("keep", [3, 4, 5, 10])
def test_as_many_stay_as_were_asked_for(tmp_path: Path, keep: int) -> None:
    for step in range(1, 9):
        save(tmp_path, step, keep=keep)
        assert len(list((tmp_path / "checkpoints").iterdir())) == min(step, keep)


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    (path / "adapter" / "weights.txt").write_text("damaged")
    save(tmp_path, 5)
    assert load_checkpoint(path).step == 5
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]


KILLED = """
import os, sys
from pathlib import Path
from gdro_cli.runtime.checkpoint import save_checkpoint
rename, count = os.rename, 0
def dying(source, target):
    global count
    count += 1
    if count == int(sys.argv[2]):
        os._exit(9)
    rename(source, target)
os.rename = dying
save_checkpoint(Path(sys.argv[1]), 5, tensors={}, state={"note": "second"}, keep=1)
"""


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_a_kill_while_a_checkpoint_is_replaced_leaves_one_of_the_two(tmp_path: Path, moment: int) -> None:
    """Before it is moved aside; when there is none of that name; when there are both."""
    save(tmp_path, 5)
    found = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(moment)], check=False)
    assert found.returncode == (9 if moment < 3 else 0)
    mend_checkpoints(tmp_path)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and load_checkpoint(newest).state["note"] == ("ü" if moment < 3 else "second")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000005"]


def test_a_path_that_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    held = load_checkpoint(save(folder, 5))
    assert torch.equal(held.tensors["lora"]["a"], TENSORS["lora"]["a"])


def test_crash_while_writing_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5)

    def crash(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 10, tensors=TENSORS, state=STATE, extra=crash, keep=1)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None and load_checkpoint(newest).step == 5
    save(tmp_path, 10)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000005", "step-000010"]


@pytest.mark.parametrize("name", ["lora.safetensors", "state.json", "adapter/weights.txt", "manifest.json"])
def test_any_flipped_byte_is_found_and_the_file_named(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, 100)
    file = path / name
    good = file.read_bytes()
    for position in {0, len(good) // 2, len(good) - 1}:
        bad = bytearray(good)
        bad[position] ^= 1
        file.write_bytes(bad)
        with pytest.raises(StoreError, match=rf"{name} .*: delete .*step-000100 to resume"):
            load_checkpoint(path)
    file.write_bytes(good[: len(good) // 2])
    with pytest.raises(StoreError, match=name):
        load_checkpoint(path)
    file.unlink()
    with pytest.raises(StoreError, match=f"{name} is missing"):
        load_checkpoint(path)


def test_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(StoreError, match="cannot write .*checkpoints"):
        save(tmp_path, 1)


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    first, second = list(module[0].parameters()), list(module[2].parameters())
    groups = [{"params": first, "lr": 1e-2, "weight_decay": 0.1}, {"params": second, "lr": 3e-3}]
    return module, torch.optim.AdamW(groups, betas=(0.9, 0.95))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_train_two_equals_train_one_and_resume_one(tmp_path: Path) -> None:
    straight, straight_optimizer = make()
    train(straight, straight_optimizer, range(4))

    module, optimizer = make()
    train(module, optimizer, range(2))
    tensors, about = flatten_optimizer(optimizer)
    files = {"optimizer": tensors, "weights": weights(module)}
    path = save_checkpoint(tmp_path, 2, tensors=files, state={"optimizer": about}, keep=1)

    resumed, resumed_optimizer = make()
    stored = load_checkpoint(path)
    resumed.load_state_dict(stored.tensors["weights"])
    restore_optimizer(resumed_optimizer, stored.tensors["optimizer"], stored.state["optimizer"])
    train(resumed, resumed_optimizer, range(2, 4))
    end, expected = weights(resumed), weights(straight)
    assert all(torch.equal(end[name], expected[name]) for name in expected)
    assert resumed_optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    # The state matters: without it the end differs.
    fresh, fresh_optimizer = make()
    fresh.load_state_dict(stored.tensors["weights"])
    train(fresh, fresh_optimizer, range(2, 4))
    assert not torch.equal(weights(fresh)["0.weight"], expected["0.weight"])


def test_state_that_is_no_tensor_comes_back_too() -> None:
    module, _ = make()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.state[next(module.parameters())] = {"seen": 3, "mean": torch.ones(5, 3)}
    tensors, about = flatten_optimizer(optimizer)
    assert set(tensors) == {"0.mean"} and about["values"] == {"0.seen": 3}
    again = torch.optim.SGD(module.parameters(), lr=0.5)
    restore_optimizer(again, tensors, about)
    assert again.state[next(module.parameters())]["seen"] == 3 and again.param_groups[0]["lr"] == 0.1


def test_optimizer_of_other_parameters_is_refused() -> None:
    module, optimizer = make()
    train(module, optimizer, range(1))
    tensors, about = flatten_optimizer(optimizer)
    other = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(StoreError, match="belongs to other parameters"):
        restore_optimizer(other, tensors, about)
    swapped = {**tensors, "0.exp_avg": torch.zeros(2, 2)}
    with pytest.raises(StoreError, match="belongs to other parameters"):
        restore_optimizer(optimizer, swapped, about)
