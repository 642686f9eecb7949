"""Checkpoints: complete or absent, every flipped byte found, optimizers restored to the bit."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdro_cli.errors import StoreError
from gdro_cli.files import json_bytes, sha256
from gdro_cli.runtime.checkpoint import (
    flatten_optimizer,
    latest_checkpoint,
    load_checkpoint,
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
        assert len(list((tmp_path / "checkpoints").iterdir())) == (1 if step == 5 else 2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000015", "step-1000000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-1000000"
    save(tmp_path, 20, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000020"]


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
save_checkpoint(Path(sys.argv[1]), 7, tensors={}, state={}, extra=lambda folder: os._exit(9), keep=1)
"""


@pytest.mark.slow
def test_the_next_checkpoint_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    """Whichever step that process was at."""
    save(tmp_path, 5)
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == 9
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-000005"
    save(tmp_path, 6, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000006"]


def test_a_crash_while_writing_leaves_the_older_checkpoint(tmp_path: Path) -> None:
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
def test_any_flipped_byte_is_detected_and_the_file_named(tmp_path: Path, name: str) -> None:
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


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and give it a valid digest again."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("sha256")
    change(manifest)
    (path / "manifest.json").write_bytes(json_bytes({**manifest, "sha256": sha256(json_bytes(manifest))}))


def test_an_untrusted_checkpoint_reads_only_its_own_files(tmp_path: Path) -> None:
    """It follows no link and no path out of its folder, and loads no pickle."""
    path = save(tmp_path, 7)
    (path / "optimizer.pt").write_bytes(pickle.dumps(print))
    assert load_checkpoint(path, needed=["lora"]).tensors.keys() == {"lora"}
    with pytest.raises(StoreError, match=r"optimizer\.safetensors is missing: delete .*step-000007"):
        load_checkpoint(path, needed=["optimizer"])
    (tmp_path / "outside").write_text("secret")
    reseal(path, lambda manifest: manifest["files"].update({"../../outside": sha256(b"secret")}))
    with pytest.raises(StoreError, match="outside is missing"):
        load_checkpoint(path)
    path = save(tmp_path, 8)
    shutil.move(path / "lora.safetensors", tmp_path / "lora.safetensors")
    (path / "lora.safetensors").symlink_to(tmp_path / "lora.safetensors")
    with pytest.raises(StoreError, match=r"lora\.safetensors is missing"):
        load_checkpoint(path)
    path = save(tmp_path, 9)
    reseal(path, lambda manifest: manifest.update(schema=2))
    with pytest.raises(StoreError, match="has schema 2, this version reads 1"):
        load_checkpoint(path)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
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
    # Without the stored state the final weights differ.
    fresh, fresh_optimizer = make()
    fresh.load_state_dict(stored.tensors["weights"])
    train(fresh, fresh_optimizer, range(2, 4))
    assert not torch.equal(weights(fresh)["0.weight"], expected["0.weight"])


def test_state_that_is_not_a_tensor_also_comes_back() -> None:
    module, _ = make()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.state[next(module.parameters())] = {"seen": 3, "mean": torch.ones(5, 3)}
    tensors, about = flatten_optimizer(optimizer)
    assert set(tensors) == {"0.mean"} and about["values"] == {"0.seen": 3}
    again = torch.optim.SGD(module.parameters(), lr=0.5)
    restore_optimizer(again, tensors, about)
    assert again.state[next(module.parameters())]["seen"] == 3 and again.param_groups[0]["lr"] == 0.1


def test_the_state_of_another_optimizer_is_refused() -> None:
    module, optimizer = make()
    train(module, optimizer, range(1))
    tensors, about = flatten_optimizer(optimizer)
    other = torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    with pytest.raises(StoreError, match="belongs to other parameters"):
        restore_optimizer(other, tensors, about)
