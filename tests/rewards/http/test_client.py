"""The reward ``http`` against a server that answers well, badly or not at all."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gdro_cli.config.load import load_recipe
from gdro_cli.errors import GdroError, PrerequisiteError, UserError
from gdro_cli.rewards import Score
from gdro_cli.rewards.http import client
from gdro_cli.rewards.http.reward import HttpReward, HttpSettings
from gdro_cli.rewards.registry import provenance
from tests.support.judge_server import Reply
from tests.support.ocr_signs import Prompt
from tests.support.reward_server import VERSION, RewardServer, answers, halves, scores

pytestmark = pytest.mark.slow

GOOD = {"value": 0.25, "details": {}}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(client, "_FIRST_PAUSE", 0.01)


@pytest.fixture
def reward_server() -> Iterator[RewardServer]:
    server = RewardServer()
    yield server
    server.close()


def reward(server: RewardServer, **settings: Any) -> HttpReward:
    return HttpReward(HttpSettings(url=server.url, **{"retries": 1, **settings}))


def score(server: RewardServer, count: int = 1, **settings: Any) -> list[Score]:
    images = [Image.new("RGB", (4 + index, 4)) for index in range(count)]
    return reward(server, **settings).score(images, [Prompt(f"p{index}", None) for index in range(count)])


def reasons(found: Sequence[Score]) -> list[str | None]:
    return [item.reason for item in found]


def test_a_request_carries_images_without_loss_and_all_of_a_prompt(reward_server: RewardServer, tmp_path: Path) -> None:
    picture = Image.effect_noise((7, 5), 60).convert("RGB")
    picture.save(tmp_path / "b.png")
    prompts = [Prompt('a "B"', "B", {"tag": "x"}), Prompt("c", None)]
    found = reward(reward_server).score([picture, tmp_path / "b.png"], prompts)
    (seen,) = reward_server.seen
    assert (seen["prompts"], seen["targets"], seen["metadata"]) == (['a "B"', "c"], ["B", None], [{"tag": "x"}, {}])
    for text in seen["images"]:
        sent = Image.open(io.BytesIO(base64.b64decode(text)))
        assert sent.format == "PNG" and sent.tobytes() == picture.tobytes()
    assert found == [Score(0.5, None, {"seen": 'a "B"'}), Score(0.5, None, {"seen": "c"})]


def test_the_image_that_a_prompt_edits_is_sent_with_it(reward_server: RewardServer) -> None:
    drawn, edited = Image.new("RGB", (4, 4), "red"), Image.effect_noise((7, 5), 60).convert("RGB")
    reward(reward_server).score([drawn, drawn], [Prompt("p", None, source=edited), Prompt("q", None)])
    (seen,) = reward_server.seen
    text, nothing = seen["sources"]
    assert Image.open(io.BytesIO(base64.b64decode(text))).tobytes() == edited.tobytes() and nothing is None
    reward(reward_server).score([drawn], [Prompt("q", None)])
    assert "sources" not in reward_server.seen[1]


def test_requests_are_divided_and_run_at_the_same_time(reward_server: RewardServer) -> None:
    def slow(payload: dict[str, Any]) -> Reply:
        return Reply(halves(payload).body, delay=0.1)

    reward_server.otherwise = slow
    found = score(reward_server, 12, images_per_request=2, concurrency=3)
    assert [item.details["seen"] for item in found] == [f"p{index}" for index in range(12)]
    assert len(reward_server.seen) == 6 and reward_server.most_at_once == 3


def test_an_image_that_cannot_be_decoded_is_not_sent(reward_server: RewardServer, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no")
    found = reward(reward_server).score([tmp_path / "x.png", Image.new("RGB", (2, 2))], [Prompt("p", None)] * 2)
    assert "cannot be decoded" in str(found[0].reason) and found[1].value == 0.5
    assert len(reward_server.seen[0]["images"]) == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"error": "too dark"}, "the reward server failed on this image: too dark"),
        ({"value": "0.5"}, "the reward server gave the value 0.5, which is not a number"),
        ({"value": True}, "the reward server gave the value true, which is not a number"),
        ({"value": None}, "the reward server gave the value null, which is not a number"),
        ({"value": float("nan")}, "a wrong score (ValueError: a score is a finite number, not nan)"),
        ({"value": float("inf")}, "a wrong score (ValueError: a score is a finite number, not inf)"),
        ({"value": 10**400}, "a wrong score (OverflowError"),
        ({"value": 1, "details": {"a": float("nan")}}, "a wrong score (ValueError"),
        ({"value": 1, "details": [1]}, "the details [1], which are not an object"),
        (0.5, "gave 0.5 instead of an object with a `value` or an `error`"),
        ({}, "the value null, which is not a number"),
    ],
)
def test_one_bad_score_is_one_missing_image(reward_server: RewardServer, row: Any, reason: str) -> None:
    reward_server.replies.append(scores(GOOD, row, GOOD))
    found = score(reward_server, 3)
    assert [item.value for item in found] == [0.25, None, 0.25]
    assert reason in str(found[1].reason)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (answers(b"<html>"), "the reward server's answer is not JSON"),
        (answers(b"[" * 100_000), "the reward server's answer is not JSON"),
        (answers(b'{"scores": ' + b"9" * 5000 + b"}"), "the reward server's answer is not JSON"),
        (answers([1]), "the reward server's answer is not a JSON object"),
        (answers({"version": VERSION}), "the reward server's answer has no list `scores`"),
        (scores(GOOD), "the reward server's answer has 1 scores for 2 images"),
        (answers(b" " * (2**23 + 1)), "the reward server's answer is larger than 8 MiB"),
        (answers({"error": "no such image"}, status=422), 'the reward server answers HTTP 422 ({"error": "no such'),
    ],
)
def test_an_answer_that_cannot_be_used_costs_the_images_of_its_request(
    reward_server: RewardServer, reply: Reply, reason: str
) -> None:
    reward_server.replies.append(reply)
    found = score(reward_server, 4, images_per_request=2, concurrency=1)
    assert [item.value for item in found] == [None, None, 0.5, 0.5]
    assert all(str(item.reason).startswith(reason) for item in found[:2])
    assert len(reward_server.seen) == 2


@pytest.mark.parametrize(
    "reply", [answers(b"", status=500), answers(b"", status=429), Reply(b"", hang_up=True), answers({}, delay=3.0)]
)
def test_what_may_pass_is_tried_again(reward_server: RewardServer, reply: Reply) -> None:
    reward_server.replies.append(reply)
    assert score(reward_server, timeout=0.5)[0].value == 0.5
    assert len(reward_server.seen) == 2


def test_a_server_that_drips_is_slow(reward_server: RewardServer) -> None:
    """A limit for each pause would never end such an answer."""
    asked = reward(reward_server, timeout=0.5, retries=0)
    asked.load()
    reward_server.drip = 0.05
    found = asked.score([Image.new("RGB", (2, 2))], [Prompt("p", None)])
    assert reasons(found) == ["the reward server gave no scores in 1 attempt, at last no answer within 0.5 s"]


def test_attempts_are_bounded_and_a_server_that_is_down_is_not_waited_for_again(reward_server: RewardServer) -> None:
    down = reward(reward_server, retries=2, images_per_request=1, concurrency=1)
    down.load()
    reward_server.otherwise = lambda payload: Reply(b"", hang_up=True)
    found = down.score([Image.new("RGB", (2, 2))] * 3, [Prompt("p", None)] * 3)
    assert len(reward_server.seen) == 3 + 1 + 1
    assert "in 3 attempts, at last RemoteProtocolError" in str(found[0].reason)
    assert "in 1 attempt, at last" in str(found[2].reason)
    reward_server.otherwise = halves
    assert down.score([Image.new("RGB", (2, 2))], [Prompt("p", None)])[0].value == 0.5


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (
            answers({"error": "who?"}, status=401),
            "HTTP 401 .*who.*: set the environment variable that reward.http",
        ),
        (answers(b"", status=403), "HTTP 403: use a key that this server accepts"),
        (answers(b"", status=404), "HTTP 404: correct reward.http.url"),
        (Reply(b"", 302, {"Location": "http://127.0.0.1:1/"}), "HTTP 302: .*redirects are not followed"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_refusal_and_a_redirect_end_the_command(
    reward_server: RewardServer, method: str, reply: Reply, words: str
) -> None:
    if method == "GET":
        reward_server.info = reply
    reward_server.otherwise = lambda payload: reply
    with pytest.raises(PrerequisiteError, match=words):
        score(reward_server)


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (answers(b"hello"), "the answer of http://.* is not JSON: correct reward.http.url, or the server"),
        (answers({}), "has no object `version`"),
        (answers({"version": {}}), "has no object `version`"),
        (answers({"version": VERSION, "needs": "target"}), "`needs` that are not a list of texts"),
        (answers({"version": VERSION, "scale": [1]}), "`scale` that is not a list of two finite numbers"),
        (answers({"version": VERSION, "scale": [float("nan"), 1]}), "`scale` that is not a list of two finite numbers"),
        (answers({"version": VERSION, "scale": [0, 10**400]}), "`scale` that is not a list of two finite numbers"),
        (answers({"version": VERSION, "scale": [1, 0]}), "`scale` that is not .* the lower one first"),
        (answers({"version": VERSION}), r"does not state a scale: set reward.http.scale to .*, such as \[0, 1\]"),
        (answers({"version": VERSION, "protocol": 2}), "has the protocol 2, and this gdro_cli speaks 1"),
        (answers({}, status=500), "answers HTTP 500: look at its messages"),
        (Reply(b"", hang_up=True), r"cannot be reached \(RemoteProtocolError.*: start it"),
    ],
)
def test_a_server_that_says_nothing_useful_about_itself(reward_server: RewardServer, info: Reply, words: str) -> None:
    reward_server.info = info
    with pytest.raises(PrerequisiteError, match=words) as caught:
        _ = reward(reward_server).version
    assert "\n" not in str(caught.value)


def test_two_scales_must_be_equal(reward_server: RewardServer) -> None:
    reward_server.info = answers({"version": VERSION, "scale": [0, 10], "protocol": 1})
    with pytest.raises(PrerequisiteError, match=r"scale \[0.0, 10.0\], and reward.http.scale is \[0.0, 1.0\]: make"):
        _ = reward(reward_server, scale=(0, 1)).version
    assert reward(reward_server).scale == reward(reward_server, scale=(0, 10)).scale == (0.0, 10.0)
    assert provenance(reward(reward_server)) == provenance(reward(reward_server, scale=(0, 10)))


@pytest.mark.parametrize("stated", [True, False])
def test_a_value_outside_the_scale_is_missing(reward_server: RewardServer, stated: bool) -> None:
    reward_server.info = answers({"version": VERSION, **({"scale": [0, 20]} if stated else {})})
    reward_server.replies.append(scores({"value": 20.00001, "details": {}}, {"value": 21.5, "details": {"a": 1}}))
    found = score(reward_server, 2, **({} if stated else {"scale": (0, 20)}))
    reason = "the reward server gave 21.5, outside its scale (0 to 20): correct reward.http.scale, or the server"
    assert found == [Score(20.00001), Score(None, reason, {"a": 1})]


@pytest.mark.parametrize(
    ("scale", "words"),
    [("[1, 0]", "the first number must be below the second"), ("[0, .inf]", "must be a finite number")],
)
def test_the_scale_of_a_recipe_is_two_finite_numbers(scale: str, words: str) -> None:
    with pytest.raises(UserError, match=rf"reward\.http\.scale.*{words}"):
        load_recipe("ocr", overrides=["reward.kind=http", "reward.http.url=http://h", f"reward.http.scale={scale}"])


def test_the_version_of_the_servers_reward_names_the_scores(reward_server: RewardServer) -> None:
    assert provenance(reward(reward_server)) == {
        "reward": "http",
        "server": VERSION,
        "scale": [0.0, 1.0],
    }


@pytest.mark.parametrize(
    ("version", "words"), [({**VERSION, "rule": "two"}, 'rule: "one" -> "two"'), (None, "an answer without a version")]
)
def test_a_server_that_changes_its_version_in_the_middle_is_noticed(
    reward_server: RewardServer, version: Any, words: str
) -> None:
    reward_server.replies.extend([scores(GOOD), scores(GOOD, version=version)])
    with pytest.raises(PrerequisiteError, match=rf"has another version than before \({words}\): run the command again"):
        score(reward_server, 2, images_per_request=1, concurrency=1)


def test_a_scoring_process_notices_another_version_when_it_starts(reward_server: RewardServer) -> None:
    asked = reward(reward_server)
    _ = asked.version
    reward_server.info = answers({"version": {"rule": "two"}})
    with pytest.raises(PrerequisiteError, match="has another version than before"):
        asked.load()


def test_prompts_must_carry_what_the_server_needs(reward_server: RewardServer) -> None:
    reward_server.info = answers({"version": VERSION, "scale": [0, 1], "needs": ["target", "tag"]})
    asked = reward(reward_server)
    with pytest.raises(ValueError, match="the key tag is missing"):
        asked.read_prompt('a "B"', target=None, metadata={})
    assert asked.read_prompt('a "B"', target=None, metadata={"tag": 1}) == "B"


def test_the_key_is_sent_and_never_shown(reward_server: RewardServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-key-1234")
    assert score(reward_server, api_key_env="MY_KEY")[0].value == 0.5
    assert all("Bearer secret-key-1234" in headers for headers in reward_server.headers)
    reward_server.otherwise = lambda payload: answers({"you": "secret-key-1234"}, status=400)
    (found,) = score(reward_server, api_key_env="MY_KEY")
    assert "secret" not in str(found.reason) and "***" in str(found.reason)
    told = {"value": 0.5, "details": {"a secret-key-1234": ["secret-key-1234"]}}
    version = {"rule": "secret-key-1234"}
    reward_server.info = answers({"version": version, "scale": [0, 1]})
    reward_server.otherwise = lambda payload: scores(told, {"error": "secret-key-1234"}, version=version)
    assert score(reward_server, 2, api_key_env="MY_KEY") == [
        Score(0.5, None, {"a ***": ["***"]}),
        Score(None, "the reward server failed on this image: ***"),
    ]
    assert reward(reward_server, api_key_env="MY_KEY").version["server"] == {"rule": "***"}
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(PrerequisiteError, match="variable MY_KEY is empty: put the reward server's API key into it"):
        score(reward_server, api_key_env="MY_KEY")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("url", "http://user:pass@host", "reward.http.url: must not hold a user name, a key or a query"),
        ("url", "http://host?key=1", "name the key's variable in reward.http.api_key_env"),
        ("api_key_env", "sk-1234", "must be the name of an environment variable .* variable such as REWARD_API_KEY"),
    ],
)
def test_a_recipe_holds_no_secret(key: str, value: str, words: str) -> None:
    kind = ["reward.kind=http", "reward.http.url=http://h"]
    for override in (f"reward.http.{key}={value}", f"ablation={{reward.http.{key}: ['{value}']}}"):
        with pytest.raises(GdroError, match=words) as caught:
            load_recipe("ocr", overrides=[*kind, override])
        assert "pass" not in str(caught.value) and "1234" not in str(caught.value)


def test_the_address_is_needed_and_must_be_one() -> None:
    with pytest.raises(UserError, match="reward.http.url: is missing"):
        load_recipe("ocr", overrides=["reward.kind=http"])
    with pytest.raises(UserError, match="reward.http.url is 'localhost:80': it must be an address like http://"):
        _ = HttpReward(HttpSettings(url="localhost:80")).version


def test_the_address_leaves_with_no_export(reward_server: RewardServer) -> None:
    from gdro_cli.stages.reporting.redaction import public_recipe

    recipe = load_recipe("ocr", overrides=["reward.kind=http", f"reward.http.url={reward_server.url}"])
    assert reward_server.url not in json.dumps(public_recipe(recipe))
