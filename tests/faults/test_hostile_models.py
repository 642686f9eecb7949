"""Malicious model folders, adapters and endpoints, made to run code, read other files, leak the key or hang."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel

from gdro_cli.embedded import tiny_model_path
from gdro_cli.models.folder import PipelineFolder
from gdro_cli.models.lora_files import Adapter, read_adapter
from gdro_cli.models.merge import merge_into
from gdro_cli.rewards.endpoint import check_base_url
from gdro_cli.rewards.judge.base import Judgement
from gdro_cli.rewards.judge.unified_reward import UnifiedRewardJudge
from gdro_cli.rewards.judge.unified_reward_local import UnifiedRewardLocal
from gdro_cli.rewards.ocr.models import DETECTION_MODEL, RECOGNITION_MODEL, find_models
from gdro_cli.rewards.pretrained import ModelFiles
from tests.support.faulty import check, outcome
from tests.support.judge_server import MODEL, JudgeServer, Reply, fails, says

SECRET = "sk-0123456789-not-to-be-seen"
IMAGE = Image.new("RGB", (8, 8))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be made hostile."""
    return Path(shutil.copytree(tiny_model_path(), tmp_path / "model"))


@pytest.fixture
def flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that hostile code would leave; standard input says yes to every question."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    return tmp_path / "flag"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("GDRO_TEST_KEY", SECRET)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    made = JudgeServer()
    yield made
    made.close()


def edit(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | entries))


def evil(folder: Path, flag: Path, **config: Any) -> None:
    """A folder with code of its own, to which it points every Auto class."""
    folder.mkdir(exist_ok=True)
    (folder / "evil.py").write_text(f"open({str(flag)!r}, 'w').close()\nclass Evil: pass\n")
    classes: dict[str, Any] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForImageTextToText"), "evil.Evil")
    classes |= {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    edit(folder / "config.json", auto_map=classes, **config)
    edit(folder / "tokenizer_config.json", auto_map=classes, tokenizer_class="Evil")


# -- code of a model folder -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("transformers", "AutoTokenizer"),
        ("transformers", "AutoConfig"),
        ("transformers", "AutoProcessor"),
        ("diffusers", "AutoModel"),
        ("diffusers", "DiffusionPipeline"),
        ("diffusers", "FluxPipeline"),
        ("diffusers", "ModularPipeline"),
        ("diffusers", "ModularPipelineBlocks"),
    ],
)
def test_a_class_that_would_choose_another_is_refused(library: str, name: str, model: Path, flag: Path) -> None:
    """Even if standard input says yes."""
    evil(model / "tokenizer", flag, model_type="evil")
    edit(model / "model_index.json", tokenizer=[library, name])
    check(outcome(lambda: PipelineFolder(model).load("tokenizer")), 2, "is not a PreTrainedTokenizerBase")
    assert not flag.exists()


@pytest.mark.parametrize("name", ["CLIPProcessor", "RagTokenizer", "PreTrainedTokenizerFast"])
def test_a_class_that_opens_others_by_itself_runs_no_code(name: str, model: Path, flag: Path) -> None:
    """Some classes of transformers call the Auto classes, and not all of them pass on their options."""
    evil(model / "tokenizer", flag, model_type="evil")
    edit(model / "tokenizer" / "preprocessor_config.json", image_processor_type="CLIPImageProcessor")
    edit(model / "model_index.json", tokenizer=["transformers", name])
    outcome(lambda: PipelineFolder(model).load("tokenizer"))
    assert not flag.exists()


def test_autoencoders_are_not_auto_classes(model: Path) -> None:
    """Their names only begin with the same letters."""
    edit(model / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    assert PipelineFolder(model).component_class("vae").__name__ == "AutoencoderKL"


@pytest.mark.parametrize("kind", ["evil", "qwen3_vl"])
def test_the_local_judge_runs_no_code_from_its_model(kind: str, tmp_path: Path, flag: Path) -> None:
    """Neither with a model type of its own nor with a known one."""
    evil(tmp_path / "judge", flag, model_type=kind)
    (tmp_path / "judge" / "model.safetensors").write_bytes(b"")
    result = outcome(lambda: UnifiedRewardLocal(tmp_path / "judge").load())
    check(result, 2 if kind == "evil" else 3, "is a evil" if kind == "evil" else "cannot be loaded")
    assert not flag.exists()


@pytest.mark.parametrize(
    "entries",
    [
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"text_config": {"attn_implementation": {"": "evil/kernel"}}},
    ],
)
def test_a_configuration_cannot_name_kernels(entries: dict[str, Any], model: Path) -> None:
    """Kernels are code from the Hub."""
    edit(model / "text_encoder" / "config.json", **entries)
    result = outcome(lambda: PipelineFolder(model).load("text_encoder", dtype=torch.float32))
    check(result, 2, "take that entry out of the file")


def test_a_reward_model_cannot_name_kernels(tmp_path: Path) -> None:
    """The tool chooses the implementation."""
    config = CLIPModel.config_class(
        text_config={"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        | {"num_attention_heads": 1},
        vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        | {"image_size": 8, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(tmp_path)
    edit(tmp_path / "config.json", attn_implementation="evil/kernel")
    files = ModelFiles(tmp_path, key="reward.some_model", kind="clip", needs=())
    assert files.load_model(CLIPModel, device="cpu").config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("part", "entry", "source"),
    [
        ("scheduler", ["diffusers", "FluxTransformer2DModel"], "transformer"),
        ("tokenizer", ["transformers", "CLIPTextModel"], "text_encoder"),
    ],
)
def test_a_pickle_beside_a_part_without_weights_is_not_read(
    part: str, entry: list[str], source: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network in place of a tokenizer or a scheduler would be loaded without ``use_safetensors``."""
    read: list[Any] = []
    monkeypatch.setattr(torch, "load", lambda *args, **options: read.append(args))
    edit(model / "model_index.json", **{part: entry})
    shutil.copy(model / source / "config.json", model / part / "config.json")
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        (model / part / name).write_bytes(pickle.dumps({}))
    check(outcome(lambda: PipelineFolder(model).load(part)), 2, f"for {part}, which is not a ")
    assert not read


# -- files elsewhere --------------------------------------------------------------------------------------------------

ADAPTER = Adapter({}, {})


def merge(model: Path, target: Path) -> Callable[[], object]:
    target.mkdir()
    return lambda: merge_into(PipelineFolder(model), ADAPTER, target)


@pytest.mark.parametrize("name", ["tokenizer/notes.txt", "tokenizer_2", "LICENSE"])
def test_a_merge_copies_no_target_of_a_link(name: str, model: Path, tmp_path: Path) -> None:
    """A file, a whole folder, or a licence."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text(SECRET)
    path = model / name
    if path.is_dir():
        shutil.rmtree(path)
    path.symlink_to(secret if name == "tokenizer_2" else secret / "key")
    check(outcome(merge(model, tmp_path / "merged")), 3, "leads out of the folder")
    assert not list((tmp_path / "merged").iterdir())


def test_links_in_the_hubs_cache_lead_only_to_its_own_blobs(model: Path, tmp_path: Path) -> None:
    """A snapshot there is a folder of links."""
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (repository / "blobs").mkdir()
    shutil.move(model, snapshot)
    config = snapshot / "tokenizer" / "tokenizer_config.json"
    config.rename(repository / "blobs" / "1")
    config.symlink_to(Path("../../../blobs/1"))
    check(outcome(merge(snapshot, tmp_path / "good")), 0)
    assert not (tmp_path / "good/tokenizer/tokenizer_config.json").is_symlink()
    (tmp_path / "secret").write_text(SECRET)
    config.unlink()
    config.symlink_to(tmp_path / "secret")
    check(outcome(merge(snapshot, tmp_path / "bad")), 3, "leads out of the folder")


# -- files that break their reader ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [
        '{"transformer.r": 0, "transformer.lora_alpha": 1, "transformer.use_rslora": false}',
        '{"transformer.r": 1, "transformer.lora_alpha": NaN, "transformer.use_rslora": false}',
    ],
    ids=["rank 0", "scale NaN"],
)
def test_an_adapter_whose_metadata_has_no_scale_is_refused(metadata: str, tmp_path: Path) -> None:
    """Each with one sentence."""
    rank = 0 if '"transformer.r": 0' in metadata else 1
    tensors = {"transformer.x.lora_A.weight": torch.ones(rank, 2), "transformer.x.lora_B.weight": torch.ones(2, rank)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": metadata})
    check(outcome(lambda: read_adapter(tmp_path / "a.safetensors")), 4, "is not an adapter")


def bomb() -> str:
    levels = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
    return f"a0: &a0 [x]\n{levels}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb(), "does not belong to a recognition model"),  # it stays small, since nothing expands it
        ("a: &a [*a]\n", "does not belong to a recognition model"),
        ("a: " + "[" * 5000, "give the model's own file"),
        ("\n".join(" " * n + "a:" for n in range(1200)), "give the model's own file"),
        ("a: " + "9" * 5000, "give the model's own file"),
        ("#" * 2_000_000, "give the model's own file"),
        ("!!python/object/apply:os.getcwd []", "give the model's own file"),
    ],
    ids=["aliases", "itself", "brackets", "deep", "number", "long", "code"],
)
def test_an_ocr_models_configuration_that_grows_is_refused(text: str, words: str, tmp_path: Path) -> None:
    """Each with one sentence."""
    models = find_models(DETECTION_MODEL, RECOGNITION_MODEL, recognition_width=160)
    for part in (models.detection, models.recognition):
        shutil.copytree(part.path, tmp_path / part.name)
    (tmp_path / RECOGNITION_MODEL / "inference.yml").write_text(text)
    options: dict[str, Any] = {"recognition_width": 320, "model_dir": tmp_path}
    check(outcome(lambda: find_models(DETECTION_MODEL, RECOGNITION_MODEL, **options)), 3, words)


def test_an_ocr_models_configuration_may_have_the_official_aliases(tmp_path: Path) -> None:
    """PaddleOCR's own files name the shapes for TensorRT once and refer to them."""
    models = find_models(DETECTION_MODEL, RECOGNITION_MODEL, recognition_width=160)
    for part in (models.detection, models.recognition):
        shutil.copytree(part.path, tmp_path / part.name)
    config = tmp_path / DETECTION_MODEL / "inference.yml"
    config.write_text(f"Hpi:\n  paddle: &id001\n    x: [1]\n  tensorrt: *id001\n{config.read_text()}")
    copies = find_models(DETECTION_MODEL, RECOGNITION_MODEL, recognition_width=160, model_dir=tmp_path)
    assert copies.detection.path == tmp_path / DETECTION_MODEL


# -- endpoints --------------------------------------------------------------------------------------------------------


class RawServer:
    """Sends raw bytes, one piece after another, to every client."""

    def __init__(self, pieces: list[bytes], *, pause: float = 0.0) -> None:
        self._pieces, self._pause = pieces, pause
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.recv(65_536)
                try:
                    for piece in self._pieces:
                        connection.sendall(piece)
                        time.sleep(self._pause)
                except OSError:
                    continue

    def close(self) -> None:
        self._socket.close()


def judge(url: str, **options: Any) -> UnifiedRewardJudge:
    return UnifiedRewardJudge(url, MODEL, api_key_env="GDRO_TEST_KEY", **{"timeout": 10.0, "retries": 0, **options})


def one(server: JudgeServer, reply: Reply) -> Judgement:
    server.replies.append(reply)
    return judge(server.url).judge([IMAGE], ["a"])[0]


def test_the_key_is_masked_in_a_models_name(server: JudgeServer) -> None:
    """Also if the name is cut inside the key."""
    server.models = Reply(json.dumps({"data": [{"id": f"{'x' * n} {SECRET}"} for n in (0, 185)]}).encode())
    result = outcome(judge(server.url).load)
    check(result, 3, "serves")
    assert "sk-" not in result.message and "***" in result.message


@pytest.mark.parametrize("line", [f"HTTP/1.1 401 bad {SECRET}\r\nContent-Length: 0\r\n\r\n", f"X {SECRET}\r\n\r\n"])
def test_the_key_is_masked_in_a_status_line(line: str, server: JudgeServer) -> None:
    """In a reason phrase, and in a line that is not a status line."""
    raw = RawServer([line.encode()])
    result = outcome(judge(raw.url).load)
    raw.close()
    check(result, 3)
    assert "sk-" not in result.message


def test_the_key_is_masked_in_a_judgement(server: JudgeServer) -> None:
    """In an answer and in an error's body, both of which are stored."""
    for reply in (says(f"{'x' * 490} {SECRET}"), fails(400, message=f"{'x' * 190} {SECRET}")):
        assert "sk-" not in str(one(server, reply))


def test_a_short_key_does_not_change_answers(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a word that means that there is no key."""
    monkeypatch.setenv("GDRO_TEST_KEY", "Score")
    assert judge(server.url).judge([IMAGE], ["a"])[0].reason is None


@pytest.mark.parametrize("address", [f"http://h/v1#{SECRET}", f"http://h/v1;key={SECRET}", f"ftp://h/v1;{SECRET}"])
def test_an_address_that_contains_a_key_is_refused_and_not_shown(address: str) -> None:
    """In a fragment or a parameter."""
    result = outcome(lambda: check_base_url(address))
    check(result, 2, "base_url")
    assert SECRET not in result.message
