"""A vision-language model as a reward: ratings, yes and no with and without probabilities, questions, bad answers."""

from __future__ import annotations

import json
import math
import pickle
from base64 import b64decode
from collections.abc import Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gdro_cli.config.load import load_recipe
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.sources import SourceImage
from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.rewards.base import ImageSource, Score
from gdro_cli.rewards.registry import provenance
from gdro_cli.rewards.vlm.answers import UnusableAnswerError, mean_of, read_rating, read_yes
from gdro_cli.rewards.vlm.reward import VlmReward, VlmSettings
from tests.support.judge_server import MODEL, JudgeServer, Reply, says

IMAGE = Image.new("RGB", (8, 6), "#c82828")


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    own = JudgeServer()
    yield own
    own.close()


def make(server: JudgeServer, **settings: Any) -> VlmReward:
    return VlmReward(VlmSettings(base_url=server.url, model=MODEL, timeout=5.0, retries=1, **settings))


def one(reward: VlmReward, **metadata: Any) -> Score:
    (score,) = reward.score([IMAGE], [PromptRecord(id="1", prompt="a red card", metadata=metadata)])
    return score


def weighed(text: str, **probabilities: float) -> Reply:
    """An answer whose first token has these alternatives, and one that says neither yes nor no."""
    tokens = [{"token": token, "logprob": math.log(p)} for token, p in {**probabilities, "Well": 0.01}.items()]
    first = {"token": text, "logprob": 0.0, "top_logprobs": tokens}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": {"content": [first]}}
    return Reply(json.dumps({"object": "chat.completion", "choices": [{**choice, "finish_reason": "stop"}]}).encode())


# --- reading answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Score: 4", 0.75),
        ("**Score (1-5): 4**", 0.75),
        ("The card is red.\n\nOverall rating = 2.5/5.", 0.375),
        ("<think>Score: 1</think>\n5", 1.0),
        ("3<|im_end|>", 0.5),
        ("Score: 5.0003", 1.0),  # a hair beyond the scale
        ("Score: 0.98", 0.0),
        ("Score: 3\nScore: 3", 0.5),
    ],
)
def test_ratings(answer: str, value: float) -> None:
    assert read_rating(answer, low=1, high=5) == value


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "has no number, not one score"),
        ("It has 4 corners.", "has no number, not one score"),
        ("Score: 4\nScore: 5", "has 4 and 5, not one score"),
        ("Score: 5.06", "has the score 5.06, which is not between 1 and 5"),
        ("Score: 4, the card is red", "has no number, not one score"),
        ("Score: 7", "has the score 7, which is not between 1 and 5"),
        ("Score: nan", "has no number, not one score"),
        ("Score: 4/10", "is a number out of 10, not out of 5"),
    ],
)
def test_unusable_ratings(answer: str, reason: str) -> None:
    with pytest.raises(UnusableAnswerError, match=f"^{reason}$"):
        read_rating(answer, low=1, high=5)


def test_yes_and_no() -> None:
    assert read_yes("Yes.", {}) == 1 and read_yes(" no, it is blue", {}) == 0
    assert read_yes("<think>no</think>yes", {}) == 1
    assert read_yes("Yes", {"Yes": 0.6, " yes": 0.2, "No": 0.2}) == pytest.approx(0.8)
    assert read_yes("yes", {"Maybe": 0.9}) == 1
    # A word in the tail of the probabilities says nothing.
    assert read_yes("Yes, the card", {"The": 0.9, "no": 1e-6}) == 1
    for answer in ("", "perhaps", "42"):
        with pytest.raises(UnusableAnswerError, match="says neither yes nor no"):
            read_yes(answer, {})


def test_means() -> None:
    assert mean_of([1, 0.25], geometric=False) == 0.625
    assert mean_of([1, 0.25], geometric=True) == pytest.approx(0.5)
    assert mean_of([1, 0], geometric=True) == 0


# --- asking --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_rating(server: JudgeServer) -> None:
    server.otherwise = lambda text: says("Score: 8")
    score = one(make(server, scale=[0, 10]))
    assert (score.value, score.details) == (0.8, {"answers": ["Score: 8"]})
    (seen,) = server.seen
    assert (seen.payload["model"], seen.payload["temperature"]) == (MODEL, 0)
    image, text = seen.payload["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert "a red card" in text["text"] and "from 0 (worst) to 10 (best)" in text["text"]
    assert "logprobs" not in seen.payload


@pytest.mark.slow
def test_yes_is_weighed_where_the_server_gives_probabilities(server: JudgeServer) -> None:
    server.replies.extend([weighed("yes", yes=0.6, no=0.2), says("yes")])
    reward = make(server, ask="yes_no")
    assert one(reward).value == pytest.approx(0.75)
    assert one(reward).value == 1
    assert server.seen[0].payload["logprobs"] is True and server.seen[0].payload["top_logprobs"] == 20


@pytest.mark.slow
def test_questions_of_a_prompt(server: JudgeServer) -> None:
    answers = {"red": weighed("yes", yes=0.8, no=0.2), "card": weighed("no", yes=0.2, no=0.8)}
    server.otherwise = lambda text: next(reply for word, reply in answers.items() if word in text)
    questions = ["Is it red?", "Is there a card?"]
    score = one(make(server, ask="questions"), questions=questions)
    assert score.value == pytest.approx(0.5) and score.details["yes"] == pytest.approx([0.8, 0.2])
    assert one(make(server, ask="questions", mean="geometric"), questions=questions).value == pytest.approx(0.4)


def test_prompts_must_have_their_questions(server: JudgeServer) -> None:
    reward = make(server, ask="questions")
    assert reward.needs == {"questions"} and make(server).needs == frozenset()
    with pytest.raises(ValueError, match="the key questions is missing"):
        reward.read_prompt("a card", target=None, metadata={})
    for questions in ([], "Is it red?", [3], [" "]):
        with pytest.raises(ValueError, match="`questions` must be a list of texts"):
            reward.read_prompt("a card", target=None, metadata={"questions": questions})


@pytest.mark.slow
def test_what_fails_is_one_missing_image(server: JudgeServer, tmp_path: Path) -> None:
    """An answer without a number, one that is cut off, a broken image, no answer at all."""
    silence = Reply(b"", hang_up=True)
    server.replies.extend([says("nice"), says("Score: 4", finish="length"), silence, silence])
    (tmp_path / "broken.png").write_bytes(b"no image")
    images: list[ImageSource] = [IMAGE, IMAGE, IMAGE, tmp_path / "broken.png", IMAGE]
    server.otherwise = lambda text: says("Score: 5")
    prompts = [PromptRecord(id=str(i), prompt="a card") for i in range(5)]
    scores = make(server, concurrency=1).score(images, prompts)
    assert [score.value for score in scores] == [None, None, None, None, 1.0]
    assert scores[0].reason == "the answer has no number, not one score"
    assert scores[1].reason == "the answer was cut off"
    assert scores[2].reason is not None and "reward.vlm's endpoint gave no answer in 2 attempts" in scores[2].reason
    assert scores[3].reason is not None and "cannot be decoded" in scores[3].reason


@pytest.mark.slow
def test_an_endpoint_without_the_model(server: JudgeServer) -> None:
    reward = VlmReward(VlmSettings(base_url=server.url, model="other", timeout=5.0, retries=0))
    with pytest.raises(PrerequisiteError, match=r"reward\.vlm's endpoint .* serves .*, not other: correct"):
        reward.load()
    assert pickle.loads(pickle.dumps(reward)).settings == reward.settings


# --- templates and recipes -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_edited_image_is_sent_after_the_image_that_was_edited(server: JudgeServer, tmp_path: Path) -> None:
    server.otherwise = lambda text: says("Score: 3")
    before = Image.new("RGB", (8, 6), "#0000ff")
    before.save(tmp_path / "before.png")
    image = SourceImage(tmp_path / "before.png", sha256((tmp_path / "before.png").read_bytes()).hexdigest())
    reward = make(server)
    edit = PromptRecord.of("make the card red", image=image)
    assert [score.value for score in reward.score([IMAGE] * 2, [edit, PromptRecord.of("a red card")])] == [0.5, 0.5]
    edited, plain = sorted((seen.payload["messages"][0]["content"] for seen in server.seen), key=len, reverse=True)
    assert [part["type"] for part in edited] == ["image_url", "image_url", "text"] and len(plain) == 2
    colours = [
        Image.open(BytesIO(b64decode(part["image_url"]["url"].partition(",")[2]))).getpixel((0, 0))
        for part in edited[:2]
    ]
    assert colours == [(0, 0, 255), IMAGE.getpixel((0, 0))]
    assert edited[2]["text"].startswith("The first image was edited into the second. The instruction was:\n\nmake the")
    assert plain[1]["text"].startswith("Look at the image. It was made from this prompt:\n\na red card")


@pytest.mark.slow
def test_own_words(server: JudgeServer, tmp_path: Path) -> None:
    """Their content names the scores, not their path; braces in a prompt mean nothing."""
    file = tmp_path / "words.txt"
    file.write_text("Rate {prompt} please.\n")
    server.otherwise = lambda text: says("Score: 3")
    reward = make(server, template=str(file))
    reward.score([IMAGE], [PromptRecord(id="1", prompt="{prompt} {x}")])
    assert server.seen[0].payload["messages"][0]["content"][1]["text"] == "Rate {prompt} {x} please."
    moved = tmp_path / "moved.txt"
    moved.write_text("Rate {prompt} please.\n")
    assert provenance(make(server, template=str(moved))) == provenance(reward)
    moved.write_text("Rate {prompt}!")
    assert provenance(make(server, template=str(moved))) != provenance(reward)
    assert str(tmp_path) not in json.dumps(provenance(reward))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"reward\.vlm\.template: .* cannot be read as text \(No such file"),
        (b"Rate it.", r"reward\.vlm\.template: .* has no place \{prompt\} for the image's prompt: add it"),
        (b"\xff\xfe{prompt}", r"cannot be read as text"),
        (b"{prompt}" + b" " * 70_000, r"has 70,008 bytes, more than 65,536"),
    ],
)
def test_bad_words(server: JudgeServer, tmp_path: Path, content: bytes | None, sentence: str) -> None:
    file = tmp_path / "words.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        make(server, template=str(file)).version  # noqa: B018


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("reward.vlm.model=m", r"reward\.vlm\.base_url: is missing"),
        ("reward.vlm={model: m, base_url: 'http://user:pw@host/v1'}", r"base_url: must not hold a user name"),
        (
            "reward.vlm={model: m, base_url: 'http://host/v1', api_key_env: sk-1234}",
            r"the name of an environment",
        ),
        (
            "reward.vlm={model: m, base_url: 'http://host/v1', scale: [5, 1]}",
            r"vlm: the first number of `scale`",
        ),
        (
            "reward.vlm={model: m, base_url: 'http://host/v1', mean: geometric}",
            r"`mean` has no meaning for `ask: r",
        ),
        ("reward.vlm={model: m, base_url: 'http://host/v1', ask: yes_no, scale: [0, 1]}", r"`scale` has no meaning"),
        ("reward.vlm={model: m, base_url: 'http://host/v1', ask: maybe}", r"reward\.vlm\.ask: must be 'rating'"),
    ],
)
def test_bad_recipes(override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        load_recipe("ocr", overrides=["reward.kind=vlm", override])
    assert "pw" not in str(caught.value) and "sk-1234" not in str(caught.value)
