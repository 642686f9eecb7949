"""``gdro export``: folders that load, nothing half-written, and pushes to a Hub on this machine."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from gdro_cli.cli.app import main
from gdro_cli.config.load import load_recipe
from gdro_cli.embedded import tiny_model_path
from gdro_cli.errors import Interrupted, PrerequisiteError, UserError
from gdro_cli.files import sha256_file
from gdro_cli.models.lora_files import Format, read_adapter
from gdro_cli.runtime.interrupt import STOPPING, StopFlag
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.exporting.export import Export, _ending_at_once, describe, run
from gdro_cli.stages.runs.finished_run import ADAPTER_NOTE
from tests.support.hub_server import TOKEN, Hub, serve
from tests.support.rows import image_row, results

QUIET = Reporter(quiet=True)
LORA = "pytorch_lora_weights.safetensors"
NAME = "small-0123"
PAPERS = {"README.md", "recipe.yaml", "images.png"}


@pytest.fixture(scope="module")
def workspace(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with one finished run."""
    root = tmp_path_factory.mktemp("workspace")
    path = make_run(root / "runs" / NAME)
    (path / "evaluations").mkdir()
    (path / "evaluations" / "grid.png").write_bytes(b"image")
    made = results(grid="evaluations/grid.png", base=[image_row(0, 0)], trained=[image_row(0, 0)])
    (path / "results.json").write_text(json.dumps(made))
    return root


@pytest.fixture(scope="module")
def block_workspace(
    make_recipe: Callable[..., Any], make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A workspace with a run that adapts layers of the blocks only, which every format can hold."""
    root = tmp_path_factory.mktemp("blocks")
    make_run(root / "runs" / NAME, make_recipe(train={"lora": {"targets": "auto"}}))
    return root


def drawn(folder: Path, lora: Path | None = None) -> np.ndarray[Any, Any]:
    from diffusers import DiffusionPipeline

    importlib.import_module("gdro_cli.tiny.autoencoder")  # where diffusers looks for the class
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 26}
    image = pipe("a red sign", generator=torch.Generator().manual_seed(7), **options).images[0]
    return np.asarray(image).astype(int)


def assert_same_updates(exported: Path, run: Path) -> None:
    """Of another scale, which is that of readers without one, but the same s B A."""
    one, other = read_adapter(exported), read_adapter(run / LORA)
    assert one.pairs.keys() == other.pairs.keys() and set(one.scales.values()) == {1.0} != set(other.scales.values())
    for layer, (down, up) in other.pairs.items():
        ours = one.pairs[layer][1] @ one.pairs[layer][0]
        torch.testing.assert_close(ours, other.scales[layer] * (up @ down), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_an_adapter_folder_and_a_merged_pipeline_draw_what_the_run_draws(workspace: Path, tmp_path: Path) -> None:
    asked = Export(NAME, adapter=tmp_path / "adapter", merge=tmp_path / "deep" / "merged")
    assert describe(asked, workspace)[0] == ("run", NAME)
    assert not list(tmp_path.iterdir())
    rows = run(asked, workspace, QUIET)
    assert rows["folder"] == f"{tmp_path / 'adapter'}, {tmp_path / 'deep' / 'merged'}"
    source, papers = workspace / "runs" / NAME, PAPERS
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {LORA, *papers}
    assert_same_updates(tmp_path / "adapter", source)
    assert (tmp_path / "adapter" / "images.png").read_bytes() == b"image"
    assert "](images.png)" in (tmp_path / "adapter" / "README.md").read_text()
    assert load_recipe(str(tmp_path / "adapter" / "recipe.yaml")).method.name == "gdro"
    merged = tmp_path / "deep" / "merged"
    own = {path.name for path in tiny_model_path().iterdir()}
    assert {path.name for path in merged.iterdir()} == own | papers
    assert not list(tmp_path.rglob(".*"))  # nothing unfinished is left

    base, adapted = drawn(tiny_model_path()), drawn(tiny_model_path(), tmp_path / "adapter")
    assert np.abs(drawn(merged) - adapted).max() <= 1
    assert np.abs(adapted - base).max() > 8


@pytest.mark.parametrize(
    ("format", "files", "words"),
    [
        ("diffusers", {LORA}, ["pipe.load_lora_weights('path/to/this/folder')", "library_name: diffusers"]),
        (
            "peft",
            {"adapter_model.safetensors", "adapter_config.json"},
            ["pipe.transformer.load_lora_adapter('path/to/this/folder', weight_name=", "library_name: peft"],
        ),
        (
            "comfyui",
            {f"{NAME}.safetensors"},
            ["Copy small-0123.safetensors into `models/loras` of ComfyUI", r"height\=64"],
        ),
        ("kohya", {f"{NAME}.safetensors"}, ["small-0123.safetensors has the names and scales of kohya", r"height\=64"]),
    ],
)
def test_each_format_of_an_adapter_has_the_run_s_updates_and_says_how_it_loads(
    format: str,
    files: set[str],
    words: list[str],
    block_workspace: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, source = tmp_path / "out", block_workspace / "runs" / NAME
    arguments = ["export", NAME, "--adapter", str(out), "--format", format, "--out", str(block_workspace)]
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--dry-run"])
    file = min(name for name in files if name.endswith(".safetensors"))
    assert f"{file} for {format}, 0." in " ".join(capsys.readouterr().out.split()) and not out.exists()
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert {path.name for path in out.iterdir()} == files | {"README.md", "recipe.yaml"}
    assert_same_updates(out, source)
    page = (out / "README.md").read_text()
    assert [text for text in words if text not in page] == []
    assert f"{LORA} of the run, SHA-256 {sha256_file(source / LORA)}" in page.replace("\\_", "_")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["diffusers", "peft"])
def test_the_code_on_the_card_loads_the_format(format: Format, workspace: Path, tmp_path: Path) -> None:
    run(Export(NAME, adapter=tmp_path / "out", format=format), workspace, QUIET)
    block = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    assert block is not None
    names: dict[str, Any] = {}
    exec(block[1].replace("path/to/this/folder", str(tmp_path / "out")), names)
    layers = {name: layer for name, layer in names["pipe"].transformer.named_modules() if hasattr(layer, "lora_A")}
    adapter = read_adapter(workspace / "runs" / NAME)
    assert layers.keys() == adapter.pairs.keys() and names["image"].size == (64, 64)
    for layer, (down, up) in adapter.pairs.items():
        update = layers[layer].get_delta_weight("default_0")
        torch.testing.assert_close(update, adapter.scales[layer] * (up @ down), rtol=1e-5, atol=1e-7)


def test_a_format_that_cannot_hold_the_adapter_is_refused_before_anything_is_made(
    workspace: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run adapts every linear layer, and kohya's tools none outside the blocks."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    words = (
        "no place for 8 of the adapter's 66 layers, such as context_embedder: export with --format diffusers or peft"
    )
    for asked in (Export(NAME, adapter=tmp_path / "a", format="kohya"), Export(NAME, push="me/a", format="kohya")):
        with pytest.raises(UserError, match=words):
            describe(asked, workspace)
        with pytest.raises(UserError, match=words):
            run(asked, workspace, QUIET)
    assert not hub.private and not hub.tokens and not (tmp_path / "a").exists()


def test_what_is_there_is_not_touched(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    for asked in (Export(NAME, adapter=tmp_path / "used"), Export(NAME, merge=tmp_path / "used")):
        with pytest.raises(UserError, match="is not empty: name a new folder for the export"):
            run(asked, workspace, QUIET)
    assert [path.name for path in tmp_path.rglob("*")] == ["used", "file"]
    (tmp_path / "empty").mkdir()
    run(Export(str(workspace / "runs" / NAME), adapter=tmp_path / "empty"), workspace, QUIET)
    assert (tmp_path / "empty" / LORA).is_file()


def test_a_merge_that_fails_leaves_nothing(workspace: Path, tmp_path: Path) -> None:
    """The base has changed since: refused before copying; and an error while copying takes its traces away."""
    copy = shutil.copytree(workspace / "runs" / NAME, tmp_path / "runs" / NAME)
    note = json.loads((copy / ADAPTER_NOTE).read_text())
    note["model"]["digest"] = "0" * 64
    (copy / ADAPTER_NOTE).write_text(json.dumps(note))
    with pytest.raises(PrerequisiteError, match="is not the one that the run small-0123 was trained on"):
        run(Export(NAME, merge=tmp_path / "merged"), tmp_path, QUIET)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the export cannot be written to"):
        run(Export(NAME, merge=tmp_path / "file"), workspace, QUIET)
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "file"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([NAME], "say what to export: --adapter DIR, --merge DIR or --push OWNER/NAME"),
        ([NAME, "--adapter", "a", "--merge", "./a"], "name the same folder"),
        ([NAME, "--adapter", "a", "--merge", "b", "--push", "me/x"], "--push uploads one folder"),
        ([NAME, "--adapter", "a", "--merge", "a/b"], "name one folder inside the other: name two"),
        ([NAME, "--adapter", "a/b", "--merge", "a"], "name one folder inside the other: name two"),
        ([NAME, "--adapter", f"{__file__}/a"], "the export cannot be written to"),
        ([NAME, "--adapter", "a", "--public"], "it goes with --push"),
        ([NAME, "--merge", "a", "--format", "kohya"], "--format is that of an adapter"),
        ([NAME, "--push", "x"], "--push x cannot be the name of a repository: write OWNER/NAME"),
        ([NAME, "--push", "me/../x"], "cannot be the name of a repository"),
        (["small-012", "--adapter", "a"], "did you mean `small-0123`?"),
    ],
)
def test_requests_that_make_no_sense_are_one_sentence(
    arguments: list[str],
    words: str,
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        main(["export", *arguments, "--out", str(workspace)])
    err = capsys.readouterr().err
    assert leaving.value.code == 2
    assert words in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


class SendsSignal(io.StringIO):
    """A terminal that sends this process SIGTERM when it is told certain words."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self._words = words

    def write(self, text: str) -> int:
        if self._words in text:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(text)


def test_a_stop_leaves_no_half_export_and_tells_how_to_go_on(workspace: Path, tmp_path: Path) -> None:
    terminal = SendsSignal("merging the adapter")
    asked = Export(NAME, adapter=tmp_path / "adapter", merge=tmp_path / "merged")
    with pytest.raises(Interrupted) as ended:
        run(asked, workspace, Reporter(Console(file=terminal, width=200)))
    assert str(ended.value) == (
        f"stopped while merging, and nothing of {tmp_path / 'merged'} is left: run the command again without --adapter,"
        " which is done"
    )
    assert STOPPING in terminal.getvalue()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    run(Export(NAME, merge=tmp_path / "merged"), workspace, QUIET)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_a_transfer_at_once(number: signal.Signals) -> None:
    with StopFlag() as stop:
        with pytest.raises(Interrupted, match="go on like this"), _ending_at_once(stop, "go on like this"):
            os.kill(os.getpid(), number)
            time.sleep(3600)
        assert stop.requested
        with pytest.raises(Interrupted, match="nor begun"), _ending_at_once(stop, "nor begun"):
            raise AssertionError("it was begun")


# --- the Hub -------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub on this machine, and no token but the one that a test sets."""
    from huggingface_hub import close_session, constants

    hub = Hub()
    server = serve(hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage is another protocol
    close_session()
    yield hub
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.slow
def test_without_a_token_nothing_is_made_or_sent(workspace: Path, tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(PrerequisiteError, match="no Hugging Face token was found: log in with `hf auth login`"):
        run(Export(NAME, merge=tmp_path / "merged", push="me/model"), workspace, QUIET)
    assert dict(describe(Export(NAME, push="me/model"), workspace))["token"].startswith("none")
    assert not hub.private and not hub.tokens and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_push_makes_a_private_repository_with_the_exported_files(
    workspace: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    told = dict(describe(Export(NAME, push="me/model"), workspace))
    assert told["to me/model"] == f"{LORA}, README.md, recipe.yaml, images.png; private" and told["token"] == "found"
    assert not hub.tokens  # so far nothing was sent
    rows = run(Export(NAME, push="me/model"), workspace, QUIET)
    assert (rows["repository"], rows["visible to"]) == (f"{hub.address}/me/model", "you (private)")
    assert hub.private == {"me/model": True} and hub.tokens <= {f"Bearer {TOKEN}", None}
    source = workspace / "runs" / NAME
    assert hub.files["me/model"].keys() == {LORA, "README.md", "recipe.yaml", "images.png"}
    (tmp_path / "pushed.safetensors").write_bytes(hub.files["me/model"][LORA])
    assert_same_updates(tmp_path / "pushed.safetensors", source)
    assert b"pipe.load_lora_weights('me/model')" in hub.files["me/model"]["README.md"]
    for data in hub.files["me/model"].values():
        assert TOKEN.encode() not in data and str(workspace).encode() not in data

    hub.private["me/model"] = False  # its owner has opened it since
    with pytest.raises(UserError, match="me/model is public: push to another repository, or add --public"):
        run(Export(NAME, push="me/model"), workspace, QUIET)
    kept = tmp_path / "adapter"
    rows = run(Export(NAME, adapter=kept, push="me/open", public=True), workspace, QUIET)
    assert rows["visible to"] == "all" and hub.private["me/open"] is False
    assert hub.files["me/open"]["README.md"] == (kept / "README.md").read_bytes()


@pytest.mark.slow
def test_a_hub_that_refuses_or_is_away_is_one_sentence(
    workspace: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuses = True
    with pytest.raises(PrerequisiteError, match=r"the push to me/model failed \(\w+, status 403\): check") as refused:
        run(Export(NAME, push="me/model"), workspace, QUIET)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(PrerequisiteError, match=r"the push to me/model failed \(\w*Connect\w*\)") as away:
        run(Export(NAME, push="me/model"), workspace, QUIET)
    assert all(TOKEN not in str(error.value) for error in (refused, away))


@pytest.mark.slow
def test_an_upload_that_fails_after_the_folder_is_there_says_how_to_go_on(
    workspace: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command would refuse the folder, which is not empty any more."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    kept = tmp_path / "kept"

    class RefusesFromNowOn(io.StringIO):
        def write(self, text: str) -> int:
            hub.refuses = hub.refuses or "uploading to" in text
            return super().write(text)

    terminal = Reporter(Console(file=RefusesFromNowOn(), width=200))
    with pytest.raises(PrerequisiteError, match=rf"and continue with `hf upload me/model {kept}`: {kept} is whole$"):
        run(Export(NAME, adapter=kept, push="me/model"), workspace, terminal)
    assert (kept / LORA).is_file()


@pytest.mark.slow
def test_a_stop_during_the_upload_says_what_is_there(
    workspace: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    terminal = Reporter(Console(file=SendsSignal("uploading to"), width=200))
    with pytest.raises(Interrupted, match=r"stopped before all was uploaded to me/model: run the command again$"):
        run(Export(NAME, push="me/model"), workspace, terminal)
    kept = tmp_path / "kept"
    with pytest.raises(Interrupted, match=rf"continue with `hf upload me/model {kept}`: {kept} is whole"):
        run(Export(NAME, adapter=kept, push="me/model"), workspace, terminal)
    assert (kept / LORA).is_file() and not hub.files.get("me/model")


def test_the_folder_one_is_in_is_refused(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a name that leads through another folder is the folder that it leads to."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="the folder that you are in"):
        run(Export(NAME, adapter=Path()), workspace, QUIET)
    (tmp_path / "there" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "there" / "inner")
    run(Export(NAME, adapter=Path("../link")), workspace, QUIET)
    assert (tmp_path / "there" / "inner" / LORA).is_file() and (tmp_path / "link").is_symlink()
