"""What an attacker would try: code in files, paths out of a folder, markup in prompts, leaked secrets."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import gdro_cli
from gdro_cli.cli.app import main
from gdro_cli.cli.failures import exit_code_of
from gdro_cli.config.load import load_recipe
from gdro_cli.core.sweeps import CurvePoint, Spread
from gdro_cli.embedded import tiny_model_path
from gdro_cli.errors import PrerequisiteError
from gdro_cli.files import sha256
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.rewards.judge.unified_reward import UnifiedRewardJudge
from gdro_cli.runtime.checkpoint import load_checkpoint, save_checkpoint
from gdro_cli.runtime.environment import environment
from gdro_cli.runtime.run import RunFolder
from gdro_cli.stages.comparison import compare
from gdro_cli.stages.exporting.export import _grid
from gdro_cli.stages.reporting.charts import sweep_chart
from gdro_cli.stages.reporting.evaluation_report import write_report
from gdro_cli.stages.reporting.model_card import CardFolder, card
from gdro_cli.stages.reporting.redaction import ADDRESS, recipe_yaml
from gdro_cli.stages.runs.finished_run import AdapterWeights, FinishedRun
from tests.faults.test_bad_results import RECIPE, RESULTS
from tests.support.faulty import check, outcome
from tests.support.judge_server import MODEL, JudgeServer, Reply, fails
from tests.support.rows import point, read
from tests.support.small_store import use

PACKAGE = Path(gdro_cli.__file__).parent
SCRIPT = "<script>alert(1)</script>"
HOSTILE = (
    f'{SCRIPT}"><img src=x onerror=alert(2)> [x](javascript:alert(3)) ![p](http://evil/p) `c` **b** $\\frac$'
    " {{ 7*7 }}"
)
SECRET = "sk-0123456789-not-to-be-seen"
TOKEN = "hf_0123456789notToBeSeenEither"


class Exploding:
    """A pickle that leaves a file when it is read."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.flag),)


# -- no code in files -------------------------------------------------------------------------------------------------

_UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas"}
_CALLS = {"torch.load", "torch.save", "np.load", "numpy.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}
# Worker processes get their tasks through a pipe from their parent, not from a file or a socket.
_PIPE = "rewards/worker.py"


def sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


@pytest.mark.slow
def test_no_source_reads_or_writes_a_pickle() -> None:
    uses = set()
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                uses |= {(name, alias.name) for alias in node.names if alias.name.split(".")[0] in _UNPICKLERS}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in _UNPICKLERS:
                uses.add((name, str(node.module)))
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                uses.add((name, "allow_pickle"))
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in _CALLS:
                uses.add((name, ast.unparse(node.func)))
    # np.load reads plain arrays by default, and these belong to the package
    assert uses == {(_PIPE, "pickle"), ("tiny/pretraining_set.py", "np.load")}


def forged_file(name: str, data: bytes, store: Path) -> None:
    """Replace a file's content and its entry in the manifest."""
    (store / "shards/00000" / name).write_bytes(data)
    manifest = store / "shards/00000/manifest.json"
    value = json.loads(manifest.read_text())
    value["files"][name] = {"bytes": len(data), "sha256": sha256(data)}
    manifest.write_text(json.dumps(value))


def test_a_pickle_in_a_store_a_checkpoint_or_a_model_is_never_read(store: Path, tmp_path: Path) -> None:
    flag = tmp_path / "exploded"
    bomb = pickle.dumps(Exploding(flag))
    (store / "shards/00000/tensors.pkl").write_bytes(bomb)
    check(outcome(lambda: use(store)), 0)
    forged_file("tensors.safetensors", bomb, store)
    check(outcome(lambda: use(store)), 4, "cannot be read")
    weights = {"a": torch.ones(2)}
    checkpoint = save_checkpoint(tmp_path / "run", 1, tensors={"adapter": weights}, state={}, keep=1)
    for name in ("adapter.bin", "optimizer.pt", "state.pkl"):
        (checkpoint / name).write_bytes(bomb)
    assert load_checkpoint(checkpoint).tensors["adapter"].keys() == weights.keys()
    model = shutil.copytree(tiny_model_path(), tmp_path / "model")
    for file in (model / "transformer").glob("*.safetensors*"):
        file.unlink()
    (model / "transformer" / "diffusion_pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(PrerequisiteError, match="component transformer"):
        PipelineFolder(str(model)).load("transformer", dtype=torch.float32)
    assert not flag.exists()


def test_no_source_trusts_code_from_elsewhere() -> None:
    """No code from a model's repository, no kernels from the Hub, no shell."""
    words = {"trust_remote_code", "use_kernels", "get_kernel", "load_custom", "custom_pipeline", "os.system"}
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text().replace("trust_remote_code=False", "")
        assert not [word for word in words if word in text], path
        assert "shell=True" not in text and "import kernels" not in text, path
    from gdro_cli.config.sections import ModelSection

    kinds = ModelSection.model_json_schema()["properties"]["attention"]["enum"]
    assert not [kind for kind in kinds if "hub" in kind or "/" in kind]


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("../outside", ["diffusers", "FluxTransformer2DModel"]),
        ("/etc", ["diffusers", "FluxTransformer2DModel"]),
        ("transformer", ["os", "system"]),
        ("transformer", ["subprocess", "run"]),
        ("transformer", ["diffusers", "logging"]),
        ("transformer", ["gdro_cli.cli.app", "main"]),
    ],
)
def test_a_model_folder_cannot_choose_code_or_another_folder(name: str, entry: list[str], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", name: entry}))
    result = outcome(lambda: PipelineFolder(str(tmp_path)).component_class(name))
    assert result.code in (2, 3), result
    check(result, result.code)


# -- no path out of a folder ------------------------------------------------------------------------------------------


def listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("name", ["../secret.png", "../../secret.png", "/etc/passwd", "link.png", "a\0.png", "x.html"])
def test_results_cannot_name_an_image_outside_their_run(name: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "small"
    run.mkdir(parents=True)
    for path in (tmp_path / "secret.png", tmp_path / "runs" / "secret.png", run / "x.html"):
        path.write_bytes(b"secret")
    (run / "link.png").symlink_to(tmp_path / "secret.png")
    assert finished_run(run, grid=name).grid is None and _grid(finished_run(run, grid=name)) is None


def test_a_comparison_reads_and_writes_only_in_its_own_folders(tmp_path: Path) -> None:
    workspace = tmp_path / "out"
    for name in ("one", "two"):
        write_run(workspace / "runs" / name, results=RESULTS | {"run": "../../../evil", "grid": "../../secret.png"})
    (tmp_path / "secret.png").write_bytes(b"secret")
    before = [name for name in listing(tmp_path) if not name.startswith("out/comparisons")]
    compare.run(["one", "two"], workspace=workspace)
    assert [name for name in listing(tmp_path) if not name.startswith("out/comparisons")] == before


def write_run(path: Path, *, results: dict[str, Any]) -> Path:
    path.mkdir(parents=True)
    (path / "results.json").write_text(json.dumps(results))
    (path / "recipe.json").write_text(json.dumps({"name": path.name}))
    (path / "resolved.json").write_text(json.dumps(RECIPE))
    (path / "metrics.jsonl").write_text(json.dumps(point(4, 0.5).to_json()) + "\n")
    return path


def finished_run(path: Path, **results: Any) -> FinishedRun:
    return FinishedRun(
        folder=RunFolder(path),
        recipe=load_recipe("smoke"),
        model={"path": "tiny", "pipeline": "FluxPipeline", "family": "flux", "dtype": "float32", "digest": "0"},
        weights=AdapterWeights(kind="ema", checkpoint="best", step=4, sha256="0"),
        call={"num_inference_steps": 3},
        manifest={"inputs": {"store": HOSTILE}, "created": HOSTILE},
        environment={"packages": {"torch": HOSTILE}, "devices": [HOSTILE], "commit": HOSTILE},
        results=read({**RESULTS, **results}),
    )


# -- no text becomes markup -------------------------------------------------------------------------------------------


def refuse_markup(page: str) -> None:
    """No tag in the hostile text stays a tag, and no template in it is filled."""
    assert SCRIPT not in page and "<script" not in page
    assert "<img src=x" not in page and " 49 " not in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)


def hostile_results() -> dict[str, Any]:
    prompts = [{"id": f"{n:012x}", "prompt": HOSTILE, "target": HOSTILE, "metadata": {}} for n in range(2)]
    details = {"u": 3.0, "text": HOSTILE, "unjudged": HOSTILE, "corrected": 0.2}
    images = [
        {"prompt_id": f"{n:012x}", "index": 0, "value": None, "reason": HOSTILE, "details": details, "file": HOSTILE}
        for n in range(2)
    ]
    return RESULTS | {
        "recipe": HOSTILE,
        "method": {"name": HOSTILE},
        "run": HOSTILE,
        "protocol": {HOSTILE: HOSTILE, "judge": {"judge": HOSTILE}},
        "protocol_name": HOSTILE,
        "verdict": {"level": "healthy", "reasons": [HOSTILE]},
        "prompts": prompts,
        "images": {"base": images, "trained": images},
    }


def test_a_report_escapes_prompts_and_recognised_text(tmp_path: Path) -> None:
    page = write_report(
        tmp_path / "report.html",
        read(hostile_results()),
        [point(4, 0.5, protocol=HOSTILE)],
        workspace=tmp_path,
        recipe={"name": HOSTILE, "eval": {"grid_prompts": 2}, "train": {"lora": {"init": HOSTILE}}},
        environment={"python": HOSTILE},
    ).read_text()
    assert "&lt;script&gt;" in page
    refuse_markup(page)


def test_a_comparison_escapes_the_texts_of_its_runs(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / "runs" / f"{name} {SCRIPT.replace('/', '')} $\\frac$", results=hostile_results())
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    page = compare.run(names, workspace=tmp_path).page.read_text()
    assert "&lt;script&gt;" in page
    refuse_markup(page)


def test_an_ablation_escapes_its_labels() -> None:
    """Its page escapes like the others. Only charts are inserted unescaped, and their labels are text."""
    points = (CurvePoint(0, Spread(0.1, 0.1, 0.1, 1)), CurvePoint(4, Spread(0.2, 0.2, 0.2, 1)))
    chart = sweep_chart({"reward": {f"path {HOSTILE}": points}}, {"reward": HOSTILE})
    assert chart is not None
    refuse_markup(chart)
    templates = PACKAGE / "stages" / "reporting" / "templates"
    unescaped = [
        (path.name, match)
        for path in templates.iterdir()
        for match in re.findall(r"\|\s*safe|autoescape", path.read_text())
    ]
    assert unescaped == [("parts.html.j2", "|safe")]  # the SVG of a chart


def test_a_model_card_escapes_the_texts_of_a_run(tmp_path: Path) -> None:
    run = replace(finished_run(tmp_path), results=read(hostile_results()))
    for place in (CardFolder(), CardFolder("adapter", HOSTILE), CardFolder("merged", HOSTILE, 0.1)):
        text = card(run, place).decode()
        front = yaml.safe_load(text.split("---\n")[1])
        assert front["library_name"] == "diffusers"
        prose = re.sub(r"^(`{3,})\w+\n.*?\n\1$", "", text, flags=re.S | re.M)
        assert "<script" not in prose.replace("\\<script", "") and "](javascript" not in prose
        assert "![p]" not in prose.replace("!\\[p", "")


# -- secrets ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDRO_TEST_KEY", SECRET)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, TOKEN)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


@pytest.mark.slow
def test_a_judges_key_is_sent_and_never_shown(
    secrets: None, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Even if an endpoint repeats the key in every way that it can."""
    server = JudgeServer()
    caplog.set_level(logging.DEBUG)
    texts: list[str] = []
    try:
        judge = UnifiedRewardJudge(server.url, MODEL, api_key_env="GDRO_TEST_KEY", timeout=20.0, retries=0)
        for reply in (fails(401, message=f"wrong key {SECRET}"), fails(400, message=SECRET), Reply(b"{}", 599)):
            server.otherwise = lambda text, reply=reply: reply  # type: ignore[misc]
            texts.append(outcome(lambda: texts.append(str(judge.judge([Image.new("RGB", (8, 8))], ["a"])))).message)
        server.models = fails(403, message=SECRET)
        texts.append(outcome(UnifiedRewardJudge(server.url, MODEL, api_key_env="GDRO_TEST_KEY").load).message)
        assert {request.authorization for request in server.seen} == {f"Bearer {SECRET}"}
        texts += [json.dumps(judge.version), repr(judge), repr(vars(judge)), pickle.dumps(judge).decode("latin-1")]
    finally:
        server.close()
    texts += [caplog.text, *capfd.readouterr()]
    assert not any(SECRET in text for text in texts)


def test_no_secret_of_the_environment_is_written(secrets: None, tmp_path: Path) -> None:
    settings = ["judge.kind=unified-reward", "judge.model=m", "judge.base_url=http://inner.host:8000/v1"]
    recipe = load_recipe("smoke", overrides=[*settings, "judge.api_key_env=GDRO_TEST_KEY"])
    folder = RunFolder.create_or_open(tmp_path, recipe=recipe.resolved(), inputs={}, environment=environment())
    out = io.StringIO()
    for arguments in (["env"], ["recipes", "show", "smoke"], ["train", "--recipe", "nowhere", "--debug"]):
        with redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit):
            main(arguments)
    written = "".join(path.read_text() for path in folder.path.iterdir() if path.is_file()) + out.getvalue()
    assert SECRET not in written and TOKEN not in written
    assert "GDRO_TEST_KEY" in written  # the name of the variable, which the recipe has
    public = recipe_yaml(recipe)
    assert "inner.host" not in public and ADDRESS in public


@pytest.mark.parametrize("address", [f"http://user:{SECRET}@h/v1", f"http://h/v1?key={SECRET}", f"http://{SECRET}@h"])
def test_a_key_in_an_address_is_refused_without_showing_it(address: str, tmp_path: Path) -> None:
    settings = ["judge.kind=unified-reward", "judge.model=m", f"judge.base_url={address}"]
    result = outcome(lambda: load_recipe("smoke", overrides=settings))
    check(result, 2, "judge.base_url")
    assert SECRET not in result.message
    for others in ([*settings, "sede=1"], [f"judge.base_url=[{address}]"]):
        assert SECRET not in outcome(lambda others=others: load_recipe("smoke", overrides=others)).message


def test_an_unexpected_error_does_not_show_the_environment(secrets: None) -> None:
    out = io.StringIO()
    with redirect_stderr(out):
        exit_code_of(RuntimeError("broken"), debug=False)
    assert SECRET not in out.getvalue() and TOKEN not in out.getvalue()
