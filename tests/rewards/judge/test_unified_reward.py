"""The judge behind an endpoint: a real HTTP server whose answers are good, unusable, late or missing."""

from __future__ import annotations

import base64
import io
import logging
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gdro_cli.config.load import load_recipe
from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.rewards.base import ImageSource
from gdro_cli.rewards.geneval.reward import GenEvalReward
from gdro_cli.rewards.judge.base import AXES, JudgeReward
from gdro_cli.rewards.judge.unified_prompt import TEMPLATE, request_text
from gdro_cli.rewards.judge.unified_reward import UnifiedRewardJudge
from gdro_cli.rewards.pool import ScoringPool
from gdro_cli.stages.setup.judge import open_judge
from tests.support.judge_server import MODEL, JudgeServer, Reply, fails, lines, says
from tests.support.ocr_signs import Prompt

pytestmark = pytest.mark.slow

KEY = "sk-not-to-be-seen-0123456789"
VARIABLE = "GDRO_TEST_JUDGE_KEY"


def make(server: JudgeServer, **options: Any) -> UnifiedRewardJudge:
    return UnifiedRewardJudge(server.url, MODEL, **{"timeout": 5.0, "retries": 1, **options})


def plain_image(colour: str = "#c82828") -> Image.Image:
    return Image.new("RGB", (8, 6), colour)


def one(judge: UnifiedRewardJudge) -> tuple[tuple[float | None, ...], str | None]:
    (judgement,) = judge.judge([plain_image()], ["a red card"])
    return tuple(judgement.axes[axis] for axis in AXES), judgement.reason


def test_a_request_contains_the_image_the_prompt_and_greedy_decoding(server: JudgeServer) -> None:
    assert one(make(server)) == ((3.5, 4.0, 2.25), None)
    (seen,) = server.seen
    assert seen.authorization is None
    assert (seen.payload["model"], seen.payload["temperature"]) == (MODEL, 0)
    (message,) = seen.payload["messages"]
    image, text = message["content"]
    assert (message["role"], text["text"]) == ("user", request_text("a red card"))
    kind, _, data = image["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (sent.format, sent.mode, sent.tobytes()) == ("PNG", "RGB", plain_image().tobytes())


def test_the_order_is_kept_and_only_the_broken_image_is_missing(server: JudgeServer, tmp_path: Path) -> None:
    """The first answers are the slowest; the caption is the style."""

    def reply(text: str) -> Reply:
        caption = int(text.rpartition("[")[2].rstrip("]"))
        return says(lines(3, 3, caption), delay=0.1 - 0.02 * caption)

    server.otherwise = reply
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    stored = tmp_path / "stored.png"
    plain_image().save(stored)
    images: list[ImageSource] = [plain_image(), broken, stored, plain_image(), plain_image()]
    judgements = make(server).judge(images, ["1", "2", "3", "4", "5"])
    assert [judgement.axes["style"] for judgement in judgements] == [1.0, None, 3.0, 4.0, 5.0]
    assert judgements[1].reason is not None and "broken.png cannot be decoded" in judgements[1].reason
    assert len(server.seen) == 4


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(b"<html>hello</html>"), "is not JSON"),
        (Reply(b"<html>hello</html>", headers={"Content-Type": "text/html"}), "not a chat completion"),
        (Reply(b""), "is not JSON"),
        (Reply(b"[1, 2]"), "not a chat completion"),
        (Reply(b"{}"), "not a chat completion"),
        (Reply(b'{"choices": null}'), "not a chat completion"),
        (Reply(b'{"choices": []}'), "not a chat completion"),
        (Reply(b'{"choices": [null]}'), "not a chat completion"),
        (Reply(b'{"choices": [{"message": {}}]}'), "not"),
        (Reply(b'{"choices": ["text"]}'), "not a chat completion"),
        (Reply(b"\xff\xfe\xfa"), "is not JSON"),
        (says(None), "is not text"),
        (says([{"type": "image"}]), "is not text"),
        (says("I cannot judge this."), "has no alignment score"),
    ],
)
def test_an_unusable_answer_makes_its_image_missing(server: JudgeServer, reply: Reply, reason: str) -> None:
    server.otherwise = lambda text: reply
    values, actual = one(make(server))
    assert values == (None, None, None)
    assert reason in str(actual)
    assert len(server.seen) == 1  # a greedy model would give the same answer again


def test_only_an_axis_that_is_absent_or_off_the_scale_is_missing(server: JudgeServer) -> None:
    server.replies.append(says("Alignment Score (1-5): 4\nStyle Score (1-5): 7"))
    values, reason = one(make(server))
    assert values == (4.0, None, None)
    assert reason is not None and "no coherence score" in reason and "style score of 7" in reason


def test_an_answer_that_was_cut_off_loses_its_last_number(server: JudgeServer) -> None:
    server.replies.append(says(lines(4, 3, 2), finish="length"))
    assert one(make(server))[0] == (4.0, 3.0, None)


@pytest.mark.parametrize(
    "trouble", [fails(500), fails(503), fails(408), fails(429), Reply(b"", hang_up=True)], ids=lambda r: str(r.status)
)
def test_temporary_errors_are_retried(server: JudgeServer, trouble: Reply) -> None:
    server.replies.extend([trouble, trouble])
    assert one(make(server, retries=2)) == ((3.5, 4.0, 2.25), None)
    assert len(server.seen) == 3


def test_a_permanent_server_error_makes_images_missing(server: JudgeServer) -> None:
    server.otherwise = lambda text: fails(500, message="out of memory")
    values, reason = one(make(server, retries=2))
    assert values == (None, None, None)
    assert reason == "the judge's endpoint gave no answer in 3 attempts, at last HTTP 500"
    assert len(server.seen) == 3


def test_a_request_whose_answer_is_too_late_is_repeated(server: JudgeServer) -> None:
    server.replies.append(says(lines(1, 1, 1), delay=2.0))
    assert one(make(server, timeout=0.2)) == ((3.5, 4.0, 2.25), None)  # the second answer, not the late one
    assert len(server.seen) == 2
    server.replies.extend([says(lines(1, 1, 1), delay=2.0)] * 2)
    values, reason = one(make(server, timeout=0.2))
    assert values == (None, None, None)
    assert reason is not None and "ReadTimeout" in reason


def test_the_retry_after_header_is_obeyed(server: JudgeServer) -> None:
    """Without it, the pause would be half a second."""
    server.replies.append(fails(429, headers={"Retry-After": "1"}))
    start = time.monotonic()
    assert one(make(server))[1] is None
    assert time.monotonic() - start >= 1.0


def test_the_number_of_simultaneous_requests_is_limited(server: JudgeServer) -> None:
    server.otherwise = lambda text: says(lines(3, 3, 3), delay=0.05)
    judgements = make(server, concurrency=3).judge([plain_image()] * 12, ["a"] * 12)
    assert all(judgement.reason is None for judgement in judgements)
    assert len(server.seen) == 12
    assert server.most_at_once == 3


@pytest.mark.parametrize(
    ("status", "message", "remedy"),
    [
        (401, "Unauthorized", "api_key_env"),
        (403, "Forbidden", "use a key that may"),
        (404, "The model `x` does not exist.", "correct the judge's model or base_url"),
        (307, "", "correct the judge's base_url"),
    ],
)
def test_a_refusal_ends_the_judging_with_one_sentence(
    server: JudgeServer, status: int, message: str, remedy: str
) -> None:
    server.otherwise = lambda text: fails(status, message=message)
    with pytest.raises(PrerequisiteError) as caught:
        make(server, concurrency=1, retries=3).judge([plain_image()] * 20, ["a"] * 20)
    error = str(caught.value)
    assert server.url in error and str(status) in error and message in error and remedy in error
    assert "\n" not in error
    assert len(server.seen) == 1  # neither this request is repeated, nor are the others sent


@pytest.mark.parametrize("status", [400, 413, 422])
def test_an_error_of_one_request_concerns_one_image(server: JudgeServer, status: int) -> None:
    server.replies.append(fails(status, message="maximum context length is 512 tokens"))
    first, *others = make(server, concurrency=1, retries=3).judge([plain_image()] * 4, ["a"] * 4)
    assert first.reason is not None and str(status) in first.reason and "512 tokens" in first.reason
    assert all(judgement.reason is None for judgement in others)
    assert len(server.seen) == 4  # the request is not repeated


def test_a_refusal_does_not_wait_for_retries_of_other_requests(server: JudgeServer) -> None:
    server.replies.append(fails(429, headers={"Retry-After": "30"}))
    server.otherwise = lambda text: fails(401)
    start = time.monotonic()
    with pytest.raises(PrerequisiteError):
        make(server, concurrency=2).judge([plain_image()] * 2, ["a"] * 2)
    assert time.monotonic() - start < 10


def test_a_redirect_is_not_followed_with_the_key(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    elsewhere = JudgeServer()
    try:
        server.otherwise = lambda text: Reply(b"", 307, {"Location": f"{elsewhere.url}/chat/completions"})
        with pytest.raises(PrerequisiteError, match=r"answers HTTP 307 .*: correct the judge's base_url"):
            one(make(server, api_key_env=VARIABLE))
        assert len(server.seen) == 1 and not elsewhere.seen
    finally:
        elsewhere.close()


def test_keys_for_another_service_are_not_sent(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client takes them from these variables by default."""
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", KEY)
    judge = make(server)
    judge.load()
    assert one(judge)[1] is None
    assert KEY not in str(server.seen) + server.model_headers


def test_a_missing_client_is_one_sentence(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdro_cli.rewards.endpoint.find_spec", lambda name: None)
    with pytest.raises(PrerequisiteError, match=r"needs the package openai: run `pip install 'gdro_cli\[judge\]'`"):
        make(server)


def test_constructing_a_judge_does_not_import_the_client() -> None:
    program = (
        "import sys; from gdro_cli.rewards.judge.unified_reward import UnifiedRewardJudge;"
        f"UnifiedRewardJudge('http://localhost:1/v1', {MODEL!r}).version; sys.exit('openai' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_loading_requests_the_list_of_models_once(server: JudgeServer) -> None:
    judge = make(server)
    judge.load()
    judge.load()
    assert one(judge)[1] is None
    assert server.model_requests == 1


def test_the_error_for_a_missing_model_names_those_of_the_endpoint(server: JudgeServer) -> None:
    judge = UnifiedRewardJudge(server.url, "another")
    with pytest.raises(PrerequisiteError, match=f"{server.url} serves {MODEL}, not another"):
        judge.load()


@pytest.mark.parametrize(
    "reply",
    [fails(404), fails(503), *(Reply(body) for body in (b"hello", b"[1]", b'{"data": []}', b'{"data": null}', b"{}"))],
)
def test_an_endpoint_that_does_not_list_its_models_is_tried(server: JudgeServer, reply: Reply) -> None:
    server.models = reply
    assert one(make(server)) == ((3.5, 4.0, 2.25), None)


def test_the_error_for_an_unreachable_endpoint_names_it(server: JudgeServer) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(PrerequisiteError, match=f"{url} cannot be reached .*ConnectError.*start the server"):
        UnifiedRewardJudge(url, MODEL).load()


def test_the_key_is_sent_and_never_shown(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    caplog.set_level(logging.DEBUG)
    judge = make(server, api_key_env=VARIABLE)
    judge.load()
    assert one(judge)[1] is None
    assert server.seen[0].authorization == f"Bearer {KEY}"
    assert KEY not in str(judge.version) and KEY.encode() not in pickle.dumps(judge) and KEY not in repr(vars(judge))
    server.otherwise = lambda text: fails(401, message=f"Incorrect API key provided:\n{KEY}.")
    with pytest.raises(PrerequisiteError, match=r"HTTP 401 \(.*Incorrect API key provided: ?\S*\*\*\*") as caught:
        one(judge)
    assert KEY not in str(caught.value)
    assert KEY not in caplog.text


def test_a_refused_key_is_noticed_when_loading(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    server.models = fails(401, message="Unauthorized")
    with pytest.raises(PrerequisiteError, match=f"{server.url} answers HTTP 401"):
        make(server, api_key_env=VARIABLE).load()


@pytest.mark.parametrize("value", [None, "", "  ", f"{KEY} {KEY}", f"{KEY}\n{KEY}", f"{KEY}é"])
def test_an_invalid_key_is_noticed_and_not_shown(
    server: JudgeServer, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, value)
    judge = make(server, api_key_env=VARIABLE)  # constructing it does not need the key
    with pytest.raises(PrerequisiteError, match=VARIABLE) as caught:
        judge.load()
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "http://", "http://host:x/v1", "", "/v1"])
def test_an_invalid_address_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="http://localhost:8000/v1"):
        UnifiedRewardJudge(url, MODEL)


@pytest.mark.parametrize("url", [f"http://user:{KEY}@host/v1", f"https://host/v1?key={KEY}"])
def test_an_address_with_a_secret_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UserError, match="api_key_env") as caught:
        UnifiedRewardJudge(url, MODEL)
    assert KEY not in str(caught.value)


def test_provenance_has_model_and_prompt_but_not_the_address() -> None:
    local = UnifiedRewardJudge("http://localhost:8000/v1", MODEL)
    remote = UnifiedRewardJudge("https://far.example/v1/", MODEL, api_key_env=VARIABLE, concurrency=2, timeout=1.0)
    assert local.version == remote.version
    assert local.version["model"] == MODEL
    assert local.version != UnifiedRewardJudge("http://localhost:8000/v1", "another").version
    assert "localhost" not in str(local.version)
    assert TEMPLATE not in str(local.version)


def test_each_image_needs_a_prompt(server: JudgeServer) -> None:
    with pytest.raises(ValueError, match="zip"):
        make(server).judge([plain_image()], ["a", "b"])
    assert make(server).judge([], []) == []


def test_through_a_scoring_pool(server: JudgeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """u = (4 + 2.25) / 2 = 3.125 without alignment. A loaded judge can also be sent; the worker reads the key again."""
    monkeypatch.setenv(VARIABLE, KEY)
    reward = JudgeReward(make(server, api_key_env=VARIABLE), axes=GenEvalReward.judge_axes)
    reward.load()
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    images: list[ImageSource] = [plain_image(), broken, plain_image("#2850be")]
    with ScoringPool(reward, workers=1) as pool:
        scores = pool.score(images, [Prompt("a card", None)] * 3)
        assert [score.value for score in scores] == [3.125, None, 3.125]
        assert scores[0].details["alignment"] == 3.5
        assert server.seen[-1].authorization == f"Bearer {KEY}"
        server.otherwise = lambda text: fails(404, message="gone")
        with pytest.raises(PrerequisiteError, match="HTTP 404 .*gone"):
            pool.score(images, [Prompt("a card", None)] * 3)


def test_a_recipe_names_the_words(server: JudgeServer, tmp_path: Path) -> None:
    """Relative to its file; their digest is part of the protocol."""
    (tmp_path / "words.txt").write_text("Caption {prompt}. Answer as you were tuned to.\n")
    recipe_file = tmp_path / "own.yaml"
    settings = f"{{kind: unified-reward, base_url: '{server.url}', model: '{MODEL}', template: words.txt}}"
    recipe_file.write_text(f"extends: ocr\njudge: {settings}\n")
    judge = open_judge(load_recipe(str(recipe_file)))
    assert judge is not None
    judge.score([plain_image()], [Prompt("a red card", "")])
    assert (
        server.seen[0].payload["messages"][0]["content"][1]["text"]
        == "Caption a red card. Answer as you were tuned to."
    )
    plain = open_judge(load_recipe(str(recipe_file), overrides=["judge.template=null"]))
    assert plain is not None and plain.version != judge.version


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, r"judge\.template: .*words\.txt cannot be read as text"), ("Judge it.", r"has no place \{prompt\}")],
)
def test_words_that_cannot_be_used(tmp_path: Path, content: str | None, sentence: str) -> None:
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_text(content)
    judge = "judge={kind: unified-reward, base_url: 'http://host/v1', model: m}"
    with pytest.raises(UserError, match=sentence):
        open_judge(load_recipe("ocr", overrides=[judge, f"judge.template={file}"]))
    with pytest.raises(UserError, match=r"judge\.template: has no meaning for judge\.kind 'none'"):
        load_recipe("ocr", overrides=["judge.kind=none", f"judge.template={file}"])
