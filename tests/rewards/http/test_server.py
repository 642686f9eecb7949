"""``gdro rewards serve`` in a process of its own: the scores of the reward itself, and answers to bad requests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from gdro_cli.rewards import Score
from gdro_cli.rewards.http.protocol import request_body
from gdro_cli.rewards.http.reward import HttpReward, HttpSettings
from gdro_cli.rewards.ocr.reward import OcrReward
from gdro_cli.rewards.png import png_base64
from gdro_cli.rewards.registry import provenance
from tests.support.ocr_signs import Prompt, ask, sign
from tests.support.plugins import BRIGHTNESS, install

pytestmark = pytest.mark.slow

WORDS = ["HELLO", "HOTEL", "BREAD", "TIGER"]
FRAGILE = BRIGHTNESS.replace(
    "        from PIL import ImageStat\n",
    """        import os
        from gdro_cli.rewards import UserError
        if image.width == 13:
            os.kill(os.getpid(), 9)
        if image.width == 17:
            raise UserError("no such width")
        from PIL import ImageStat
""",
)
"""Brightness that kills its process on one width, and gives up on another."""

Serve = Callable[..., str]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Start a server and return its address."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started: list[subprocess.Popen[str]] = []
    install(tmp_path, "brightness", FRAGILE, target="Brightness")

    def start(name: str, *options: str) -> str:
        command = [sys.executable, "-m", "gdro_cli", "rewards", "serve", name, "--port", "0", *options]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE)
        started.append(process)
        assert process.stderr is not None
        line = process.stderr.readline()
        assert " is at http://127.0.0.1:" in line, line + process.stderr.read()
        return line.split(" is at ")[1].split()[0]

    yield start
    for process in started:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")


def post(url: str, body: bytes | dict[str, Any], **headers: str) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(url, content=content, headers={"Content-Type": "application/json", **headers}, timeout=60)


def one(image: Image.Image) -> bytes:
    return request_body([png_base64(image)], [Prompt("p", None)])


def test_ocr_behind_a_server_gives_the_scores_of_ocr(serve: Serve, reward: OcrReward) -> None:
    url = serve("ocr")
    images = [sign([word], colour="#2850be") for word in WORDS]
    remote = HttpReward(HttpSettings(url=url, images_per_request=2))
    assert remote.score(images, [ask(word) for word in WORDS]) == reward.score(images, [ask(word) for word in WORDS])
    assert remote.version == {"reward": "http", "server": provenance(reward), "scale": [0.0, 1.0]}
    assert remote.read_prompt('a "B"', target=None, metadata={}) == "B"


def test_a_crash_costs_its_image_and_a_give_up_its_request(serve: Serve) -> None:
    url = serve("brightness", "--set", "reward.workers=1", "--set", "reward.brightness.power=2")
    images = [Image.new("RGB", (width, 4), (51, 51, 51)) for width in (5, 13, 5)]
    remote = HttpReward(HttpSettings(url=url, retries=0))
    found = remote.score(images, [Prompt("p", None)] * 3)
    assert [item.value for item in found] == [pytest.approx(0.04), None, pytest.approx(0.04)]
    assert "worker died on this image (exit code -9)" in str(found[1].reason)
    assert remote.version["server"]["settings"] == {"power": 2.0}
    assert post(url, one(Image.new("RGB", (17, 4)))).json() == {"error": "no such width"}
    assert post(url, one(Image.new("RGB", (5, 4)))).json()["scores"] == [{"value": 0.0, "details": {}}]


def test_a_reward_sees_the_image_that_its_prompt_edits(serve: Serve, tmp_path: Path) -> None:
    """The brightness of the source: by another process of another process."""
    code = BRIGHTNESS.replace("image.convert", "prompt.source.convert").replace(
        "    version", "    needs = frozenset({'image'})\n    version"
    )
    install(tmp_path, "brightness", code, target="Brightness")
    url, black = serve("brightness", "--set", "reward.workers=1"), Image.new("RGB", (5, 4))
    remote = HttpReward(HttpSettings(url=url))
    (score,) = remote.score([black], [Prompt("p", None, {"image": "0" * 64}, Image.new("RGB", (5, 4), "white"))])
    assert score.value == 1.0
    with pytest.raises(ValueError, match="the key image is missing"):
        remote.read_prompt("p", target=None, metadata={})
    body = json.loads(one(black)) | {"sources": ["no image"]}
    assert post(url, body).json()["scores"] == [{"error": "the key image is missing"}]
    body["metadata"] = [{"image": "0" * 64}]
    assert post(url, body).json()["scores"] == [{"error": "the image is not a PNG, WebP or JPEG in base64"}]
    assert "one for each image" in post(url, body | {"sources": []}).json()["error"]


def test_a_server_states_no_scale_that_is_not_finite(serve: Serve, tmp_path: Path) -> None:
    code = BRIGHTNESS.replace("    version", "    scale = (0.0, float('inf'))\n    version").replace("/ 255", "")
    install(tmp_path, "brightness", code, target="Brightness")
    url = serve("brightness", "--set", "reward.workers=1")
    assert "scale" not in httpx2.get(url).json()
    remote = HttpReward(HttpSettings(url=url, scale=(0, 255)))
    assert remote.score([Image.new("RGB", (5, 4), "white")], [Prompt("p", None)]) == [Score(255.0)]


def test_a_mixture_behind_a_server_has_the_processes_of_its_parts(serve: Serve) -> None:
    url = serve("mix", "--set", "reward.mix.weights={ocr: 1, brightness: 3}", "--set", "reward.workers=1")
    remote = HttpReward(HttpSettings(url=url))
    prompt = ask("HELLO")
    crash, good = remote.score([Image.new("RGB", (13, 4)), sign(["HELLO"], colour="#ffffff")], [prompt] * 2)
    assert str(crash.reason).startswith("the reward server failed on this image: brightness: the scoring worker died")
    assert good.value is not None and good.details["ocr"] == 1.0
    body = request_body([png_base64(Image.new("RGB", (17, 4)))], [prompt])
    assert post(url, body).json() == {"error": "no such width"}  # which ends the processes of one part
    assert remote.score([sign(["HELLO"], colour="#ffffff")], [prompt]) == [good]


def test_bad_requests(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_KEY", "open-sesame")
    url = serve("brightness", "--key-env", "REWARD_KEY", "--set", "reward.workers=1")
    key = {"Authorization": "Bearer open-sesame"}
    image = one(Image.new("RGB", (5, 4)))
    assert httpx2.get(url).status_code == 401
    assert post(url, image).json() == {"error": "the key is missing or wrong"}
    assert post(url, image, Authorization="Bearer open-sesam").status_code == 401
    assert httpx2.get(url, headers=key).json()["needs"] == []
    assert post(url, image, **key, **{"Content-Type": "text/plain"}).status_code == 415
    lists = {"prompts": ["p"], "targets": [None], "metadata": [{}], "images": ["x"]}
    for body, words in (
        (b"{", "the body is not JSON"),
        (b"[1]", "lists of one length"),
        ({**lists, "prompts": []}, "lists of one length"),
        ({**lists, "prompts": [1]}, "images and prompts are texts"),
        ({key: value * 257 for key, value in lists.items()}, "at most 256 images, not 257"),
    ):
        answer = post(url, body, **key)
        assert answer.status_code == 400 and words in answer.json()["error"]
    for text in ("x", "!", "aGVsbG8="):
        (row,) = post(url, {**lists, "images": [text]}, **key).json()["scores"]
        assert row == {"error": "the image is not a PNG, WebP or JPEG in base64"}
    assert HttpReward(HttpSettings(url=url, api_key_env="REWARD_KEY")).score(
        [Image.new("RGB", (5, 4))], [Prompt("p", None)]
    ) == [Score(0.0)]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["brightness", "--host", "0.0.0.0"], 2, "others can reach 0.0.0.0: name the environment variable with a key"),
        (["brightness", "--host", "256.1.1.1", "--key-env", "REWARD_KEY"], 2, "cannot listen on 256.1.1.1, port 8000"),
        (["brightness", "--key-env", "NO_SUCH"], 3, "the environment variable NO_SUCH is empty"),
        (["brightness", "--key-env", "sk-secretkey1"], 2, "--key-env must be the name of an environment variable"),
        (["brightnes"], 2, "did you mean `brightness`?"),
        (["brightness", "--set", "reward.brightness.power=x"], 2, "reward.brightness.power: must be a number"),
    ],
)
def test_a_server_that_cannot_start_says_why(options: list[str], code: int, words: str, tmp_path: Path) -> None:
    install(tmp_path, "brightness", BRIGHTNESS, target="Brightness")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "REWARD_KEY": "open-sesame"}
    command = [sys.executable, "-m", "gdro_cli", "rewards", "serve", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, words in done.stderr) == (code, True), done.stderr
    assert "secretkey" not in done.stderr
