"""Run folders, checkpoints and locks that somebody edited, cut or forged."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gdro_cli.files import json_bytes, sha256, sha256_file
from gdro_cli.runtime.checkpoint import flatten_optimizer, load_checkpoint, restore_optimizer, save_checkpoint
from gdro_cli.runtime.lock import folder_lock
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.runs.store_times import note_batch, read_batches
from tests.support.faulty import Case, check, command, outcome, rows

RECIPE = {"name": "small", "train": {"steps": 3}, "method": {"name": "gdro"}}
INPUTS = {"store": "aaaabbbbcccc"}
POINT = {"kind": "validation", "step": 3, "protocol": "p", "reward": 0.5, "prompts": 2, "images": 2, "failed": 0}
Harm = Callable[[Path], object]


def open_run(path: Path) -> RunFolder:
    return RunFolder.create_or_open(path, recipe=RECIPE, inputs=INPUTS, environment={"python": "3.11"})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = open_run(tmp_path / "runs" / "small-1")
    for step in (1, 2, 3):
        folder.append_metrics({"kind": "train", "step": step, "loss": 0.5})
    folder.append_metrics(POINT)
    folder.write_json("stores.json", [{"step": 0, "sampling": 1.0, "scoring": 2.0}])
    return folder.path


def put(name: str, data: bytes) -> Harm:
    return lambda path: (path / name).write_bytes(data)


def edit(name: str, change: Callable[[Any], object]) -> Harm:
    def harm(path: Path) -> None:
        value = json.loads((path / name).read_text())
        changed = change(value)
        (path / name).write_text(json.dumps(value if changed is None else changed))

    return harm


def line(data: bytes) -> Harm:
    """Another line of metrics, in the middle."""

    def harm(path: Path) -> None:
        first, rest = (path / "metrics.jsonl").read_bytes().split(b"\n", 1)
        (path / "metrics.jsonl").write_bytes(first + b"\n" + data + b"\n" + rest)

    return harm


def point(*without: str, **changes: object) -> Harm:
    """An evaluation point of step 1, in the middle."""
    row = {name: value for name, value in {**POINT, "step": 1, **changes}.items() if name not in without}
    return line(json.dumps(row).encode())


def use_run(path: Path) -> None:
    """What every stage reads of a run."""
    folder = open_run(path)
    folder.truncate_metrics(after_step=3)
    assert len(folder.metrics()) >= 4
    note_batch(folder, None, step=1)
    read_batches(folder)
    assert folder.recipe == RECIPE


BAD_LINE = "metrics.jsonl line 2 is damaged"
RUNS = [
    Case("untouched", lambda path: None, 0),
    Case("manifest empty", put("manifest.json", b""), 4, "manifest.json is damaged"),
    Case("manifest cut", put("manifest.json", b'{"schema": 1'), 4, "manifest.json is damaged"),
    Case("manifest a list", put("manifest.json", b"[]"), 4, "manifest.json is damaged"),
    Case("manifest null", put("manifest.json", b"null"), 4, "manifest.json is damaged"),
    Case("manifest of brackets", put("manifest.json", b"[" * 100_000), 4, "manifest.json is damaged"),
    Case("manifest no UTF-8", put("manifest.json", b'{"schema": "\xff"}'), 4, "manifest.json is damaged"),
    Case("manifest NaN", put("manifest.json", b'{"schema": NaN}'), 4, "manifest.json is damaged"),
    Case("manifest a pickle", put("manifest.json", pickle.dumps({"schema": 1})), 4, "manifest.json is damaged"),
    Case("another schema", edit("manifest.json", lambda v: v.update(schema=2)), 4, "has schema 2"),
    Case("no schema", edit("manifest.json", lambda v: v.pop("schema") and None), 4, "has schema None"),
    Case("other inputs", edit("manifest.json", lambda v: v.update(inputs={"store": "x"})), 4, "inputs.store"),
    Case("inputs a list", edit("manifest.json", lambda v: v.update(inputs=[1])), 4, "made from something else"),
    Case("no inputs", edit("manifest.json", lambda v: v.pop("inputs") and None), 4, "made from something else"),
    Case("huge input", edit("manifest.json", lambda v: v.update(inputs={"store": "x" * 10**6})), 4, "inputs.store"),
    Case("recipe edited", edit("recipe.json", lambda v: v["train"].update(steps=4)), 4, "recipe.train.steps"),
    Case("recipe with a key more", edit("recipe.json", lambda v: v.update(x=1)), 4, "recipe.x"),
    Case("recipe a list", put("recipe.json", b"[]"), 4, "recipe.json is damaged"),
    Case("recipe cut", put("recipe.json", b'{"name'), 4, "recipe.json is damaged"),
    Case("recipe gone", lambda path: (path / "recipe.json").unlink(), 4, "recipe.json is missing"),
    Case("recipe a folder", lambda path: _folder(path / "recipe.json"), 4, "recipe.json is damaged"),
    Case("environment cut", put("environment.json", b"{"), 4, "environment.json is damaged"),
    Case("metrics torn at the end", lambda path: _append(path, b'{"step": 4, "lo'), 0),
    Case("metrics torn in a letter", lambda path: _append(path, b'{"step": "\xc3'), 0),
    Case("a line of nothing", line(b""), 4, BAD_LINE),
    Case("a line cut", line(b'{"step": 1'), 4, BAD_LINE),
    Case("a line null", line(b"null"), 4, BAD_LINE),
    Case("a line a number", line(b"3"), 4, BAD_LINE),
    Case("a line a list", line(b"[]"), 4, BAD_LINE),
    Case("a line no UTF-8", line(b'{"step": 1, "kind": "\xff"}'), 4, BAD_LINE),
    Case("a line NUL", line(bytes(50)), 4, BAD_LINE),
    Case("a line of brackets", line(b"[" * 100_000), 4, BAD_LINE),
    Case("no step", line(b'{"kind": "train", "loss": 1}'), 4, BAD_LINE),
    Case("step a text", line(b'{"kind": "train", "step": "../../x"}'), 4, BAD_LINE),
    Case("step true", line(b'{"kind": "train", "step": true}'), 4, BAD_LINE),
    Case("step half", line(b'{"kind": "train", "step": 1.5}'), 4, BAD_LINE),
    Case("step below 0", line(b'{"kind": "train", "step": -1}'), 4, BAD_LINE),
    Case("loss a text", line(b'{"kind": "train", "step": 1, "loss": "low"}'), 4, BAD_LINE),
    Case("loss NaN", line(b'{"kind": "train", "step": 1, "loss": NaN}'), 4, BAD_LINE),
    Case("loss infinite", line(b'{"kind": "train", "step": 1, "loss": 1e999}'), 4, BAD_LINE),
    Case("loss a list", line(b'{"kind": "train", "step": 1, "loss": [1]}'), 4, BAD_LINE),
    Case("kind a number", line(b'{"kind": 3, "step": 1}'), 4, BAD_LINE),
    Case("loss missing", line(b'{"kind": "train", "step": 1, "loss": null}'), 0),
    Case("no kind", line(b'{"step": 1, "loss": 0.5, "seconds": 1.0}'), 4, BAD_LINE),
    Case("kind null", line(b'{"kind": null, "step": 1}'), 4, BAD_LINE),
    Case("a point more", point(), 0),
    *(
        Case(f"a point without {name}", point(name), 4, BAD_LINE)
        for name in ("protocol", "reward", "prompts", "images")
    ),
    Case("a point without failed", point("failed"), 0),
    Case("a point's reward null", point(reward=None), 4, BAD_LINE),
    *(
        Case(f"a point's {name} {value!r}", point(**{name: value}), 4, BAD_LINE)
        for name in ("prompts", "images", "failed", "unjudged")
        for value in (-1, 1.5, True, None, "2")
    ),
    Case("metrics a pipe", lambda path: _pipe(path / "metrics.jsonl"), 4, "metrics.jsonl is no ordinary file"),
    Case("metrics a folder", lambda path: _folder(path / "metrics.jsonl"), 4, "metrics.jsonl is no ordinary file"),
    Case("times a number", put("stores.json", b"3"), 4, "stores.json is damaged"),
    Case("times cut", put("stores.json", b"["), 4, "stores.json is damaged"),
    Case("times of texts", put("stores.json", b'["a"]'), 4, "stores.json is damaged"),
    Case("times without step", put("stores.json", b'[{"sampling": 1}]'), 4, "stores.json is damaged"),
    *(
        Case(
            f"a time of {name}",
            put("stores.json", b'[{"step": 0, "sampling": %s, "scoring": 1}]' % name.encode()),
            4,
            "stores.json is damaged: delete it",
        )
        for name in ('"x"', '"1.5"', '"inf"', "true", "-1", "1e99", "[1]", "{}")
    ),
    Case("a time too few", put("stores.json", b'[{"step": 0, "sampling": 1}]'), 4, "stores.json is damaged: delete it"),
    Case("times at step true", put("stores.json", b'[{"step": true, "sampling": 1, "scoring": 1}]'), 4, "is damaged"),
    Case("a time that is not known", put("stores.json", b'[{"step": 0, "sampling": null, "scoring": 1}]'), 0),
]


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _append(path: Path, data: bytes) -> None:
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(data)


@rows(RUNS)
def test_a_run(case: Case, run: Path) -> None:
    case.given(run)
    check(outcome(lambda: use_run(run)), case.code, case.words)


LISTED = [
    Case("method a text", b'{"name": "a", "method": "gdro"}', 0),
    Case("train a list", b'{"name": "a", "train": [1]}', 0),
    Case("all null", b'{"name": null, "train": null, "method": null}', 0),
    Case("a list", b"[]", 0),
    Case("brackets", b"[" * 100_000, 0),
    Case("no UTF-8", b"\xff\xfe", 0),
    Case("markup and control", b'{"name": "[bold]\\u001b[31m<b>"}', 0),
    Case("huge", b'{"name": "' + b"x" * 100_000 + b'"}', 0),
]


@rows(LISTED)
def test_gdro_runs_lists_a_run_whatever_is_in_it(case: Case, run: Path) -> None:
    (run / "recipe.json").write_bytes(case.given)
    (run / "metrics.jsonl").write_bytes(case.given.replace(b"\n", b""))
    check(command("runs", str(run.parents[1])), case.code)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def _optimizer() -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    parameters = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))]
    return torch.optim.AdamW(parameters, lr=0.1), parameters


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    optimizer, parameters = _optimizer()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors, state = flatten_optimizer(optimizer)
    weights = {"a": torch.ones(2)}
    return save_checkpoint(
        tmp_path,
        7,
        tensors={"adapter": weights, "ema": weights, "optimizer": tensors},
        state={"optimizer": state},
        keep=1,
    )


def resealed(change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> Harm:
    """Digests that fit whatever the files hold now, and a manifest that fits its own."""

    def harm(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        manifest.pop("sha256")
        manifest["files"] = {name: sha256_file(path / name) for name in manifest["files"] if (path / name).is_file()}
        change(manifest)
        manifest["sha256"] = sha256(json_bytes(manifest))
        (path / "manifest.json").write_bytes(json_bytes(manifest))

    return harm


def then(first: Harm, second: Harm) -> Harm:
    return lambda path: (first(path), second(path))


def changed_state(change: Callable[[Any], object]) -> Harm:
    return then(edit("state.json", change), resealed())


def _outside(path: Path) -> None:
    shutil.move(path / "ema.safetensors", path.parent / "ema.safetensors")
    (path / "ema.safetensors").symlink_to(path.parent / "ema.safetensors")


def use_checkpoint(path: Path) -> None:
    """What resuming reads."""
    held = load_checkpoint(path, needed=("adapter", "ema", "optimizer"))
    assert held.step == 7
    optimizer, _ = _optimizer()
    restore_optimizer(optimizer, held.tensors["optimizer"], held.state.get("optimizer", {}))


OTHER = "belongs to other parameters"
UNREADABLE = "optimizer state cannot be read"
ENTRY = "an entry cannot be used"
CHECKPOINTS = [
    Case("untouched", lambda path: None, 0),
    Case("resealed", resealed(), 0),
    Case("a pickle beside", put("optimizer.pt", pickle.dumps(print)), 0),
    Case("manifest empty", put("manifest.json", b""), 4, "cannot be read"),
    Case("manifest a list", put("manifest.json", b"[]"), 4, "is damaged"),
    Case("manifest of brackets", put("manifest.json", b"[" * 100_000), 4, "cannot be read"),
    Case("manifest edited", edit("manifest.json", lambda v: v.update(step=8)), 4, "its SHA-256 differs"),
    Case("manifest gone", lambda path: (path / "manifest.json").unlink(), 4, "is missing"),
    Case("state edited", edit("state.json", lambda v: v.update(x=1)), 4, "state.json is damaged"),
    Case("state gone", lambda path: (path / "state.json").unlink(), 4, "state.json is missing"),
    Case("adapter gone", lambda path: (path / "adapter.safetensors").unlink(), 4, "adapter.safetensors is missing"),
    Case("adapter empty", put("adapter.safetensors", b""), 4, "adapter.safetensors is damaged"),
    Case("adapter a pickle", put("adapter.safetensors", pickle.dumps({})), 4, "adapter.safetensors is damaged"),
    Case("forged adapter empty", then(put("adapter.safetensors", b""), resealed()), 4, "holds no tensors"),
    Case("forged pickle", then(put("adapter.safetensors", pickle.dumps({})), resealed()), 4, "holds no tensors"),
    Case("forged huge header", then(put("ema.safetensors", b"\xff" * 16), resealed()), 4, "holds no tensors"),
    Case("link", _outside, 4, "ema.safetensors is missing"),
    Case("other schema", resealed(lambda m: m.update(schema=2)), 4, "has schema 2"),
    Case("no schema", resealed(lambda m: m.pop("schema")), 4, "has schema None"),
    Case("no step", resealed(lambda m: m.pop("step")), 4, ENTRY),
    Case("step a text", resealed(lambda m: m.update(step="7")), 4, ENTRY),
    Case("files a list", resealed(lambda m: m.update(files=[])), 4, ENTRY),
    Case("no files", resealed(lambda m: m.update(files={})), 4, ENTRY),
    Case("a file up", resealed(lambda m: m["files"].update({"../../x": "0"})), 4, ENTRY),
    Case("an absolute file", resealed(lambda m: m["files"].update({"/etc/passwd": "0"})), 4, ENTRY),
    Case("a file with a NUL", resealed(lambda m: m["files"].update({"a\0b": "0"})), 4, ENTRY),
    Case("tensors a text", resealed(lambda m: m.update(tensors="adapter")), 4, ENTRY),
    Case("tensors up", resealed(lambda m: m["tensors"].append("../../x")), 4, ENTRY),
    Case("tensors a number", resealed(lambda m: m["tensors"].append(3)), 4, ENTRY),
    Case("no optimizer", resealed(lambda m: m["tensors"].remove("optimizer")), 4, "optimizer.safetensors is missing"),
    Case("forged state a list", then(put("state.json", b"[]"), resealed()), 4, "state.json is damaged"),
    Case("forged state cut", then(put("state.json", b"{"), resealed()), 4, "state.json cannot be read"),
    Case("no optimizer state", changed_state(lambda v: v.clear()), 4, UNREADABLE),
    Case("optimizer state null", changed_state(lambda v: v.update(optimizer=None)), 4, UNREADABLE),
    Case("optimizer state a list", changed_state(lambda v: v.update(optimizer=[])), 4, UNREADABLE),
    Case("groups a number", changed_state(lambda v: v["optimizer"].update(groups=3)), 4, UNREADABLE),
    Case("groups of nothing", changed_state(lambda v: v["optimizer"].update(groups=[])), 4, OTHER),
    Case(
        "a group too many",
        changed_state(lambda v: v["optimizer"]["groups"].append(v["optimizer"]["groups"][0])),
        4,
        OTHER,
    ),
    Case(
        "group without params",
        changed_state(lambda v: v["optimizer"]["groups"][0].pop("params") and None),
        4,
        UNREADABLE,
    ),
    Case("group with one param", changed_state(lambda v: v["optimizer"]["groups"][0].update(params=[0])), 4, OTHER),
    Case("betas a number", changed_state(lambda v: v["optimizer"]["groups"][0].update(betas=1)), 4, UNREADABLE),
    Case("lr a text", changed_state(lambda v: v["optimizer"]["groups"][0].update(lr="fast")), 4, OTHER),
    Case("betas of texts", changed_state(lambda v: v["optimizer"]["groups"][0].update(betas=["a", "b"])), 4, OTHER),
    Case("value of no number", changed_state(lambda v: v["optimizer"].update(values={"x.step": 1})), 4, UNREADABLE),
    Case("value of parameter 99", changed_state(lambda v: v["optimizer"].update(values={"99.step": 1})), 4, OTHER),
]


@rows(CHECKPOINTS)
def test_a_checkpoint(case: Case, checkpoint: Path) -> None:
    case.given(checkpoint)
    check(outcome(lambda: use_checkpoint(checkpoint)), case.code, case.words)


# -- locks ------------------------------------------------------------------------------------------------------------

HOST = os.uname().nodename
HELD = "if it is gone delete"
LOCKS = [
    Case("garbage", b"\x00\xff", 4, HELD),
    Case("text", b"locked by me", 4, HELD),
    Case("null", b"null", 4, HELD),
    Case("a list", b"[1, 2, 3]", 4, HELD),
    Case("brackets", b"[" * 100_000, 4, HELD),
    Case("pid a text", json.dumps({"host": HOST, "pid": "7", "began": ""}).encode(), 4, HELD),
    Case("pid 0", json.dumps({"host": HOST, "pid": 0, "began": ""}).encode(), 4, HELD),
    Case("pid -1", json.dumps({"host": HOST, "pid": -1, "began": ""}).encode(), 4, HELD),
    Case("pid huge", json.dumps({"host": HOST, "pid": 10**30, "began": ""}).encode(), 4, HELD),
    Case("host a list", json.dumps({"host": [], "pid": 7, "began": ""}).encode(), 4, HELD),
    Case("another key", json.dumps({"host": HOST, "pid": 7, "began": "", "x": 1}).encode(), 4, HELD),
    Case(
        "another machine",
        json.dumps({"host": "elsewhere", "pid": 7, "began": ""}).encode(),
        4,
        "process 7 on elsewhere",
    ),
    Case("our own process", json.dumps({"host": HOST, "pid": os.getpid(), "began": ""}).encode(), 4, f"on {HOST}"),
    Case("a process that is dead", json.dumps({"host": HOST, "pid": 2**22 - 1, "began": "1"}).encode(), 0),
]


@rows(LOCKS)
def test_a_lock(case: Case, tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(case.given)
    check(outcome(lambda: _take(tmp_path / "lock")), case.code, case.words)
    assert (tmp_path / "lock").exists() == bool(case.code)


def test_a_lock_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    check(outcome(lambda: _take(tmp_path / "lock")), 4, "is a directory")


def _take(path: Path) -> None:
    with folder_lock(path):
        pass


CASES = [*RUNS, *LISTED, *CHECKPOINTS, *LOCKS]
