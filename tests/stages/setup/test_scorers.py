"""Which scoring processes a reward gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from PIL import Image

from gdro_cli.config.load import load_reward_section
from gdro_cli.rewards.base import Score
from gdro_cli.rewards.pool import Pool
from gdro_cli.rewards.registry import open_reward
from gdro_cli.stages.setup.scorers import make_reward_pool
from tests.support.judge_server import Reply
from tests.support.ocr_signs import Prompt
from tests.support.reward_server import RewardServer, halves

pytestmark = pytest.mark.slow


@pytest.fixture
def reward_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RewardServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = RewardServer()
    yield server
    server.close()


def pool_of(kind: str, *overrides: str) -> Pool:
    section = load_reward_section(kind, overrides=overrides)
    return make_reward_pool(open_reward(section), section, cores=2)


def score(pool: Pool, count: int) -> list[Score]:
    images = [Image.new("RGB", (4, 4))] * count
    with pool:
        return pool.score(images, [Prompt("p", None)] * count)


def test_a_server_gets_all_of_its_simultaneous_requests_also_for_few_images(reward_server: RewardServer) -> None:
    reward_server.otherwise = lambda payload: Reply(halves(payload).body, delay=0.3)
    http = f"{{url: '{reward_server.url}', images_per_request: 1, concurrency: 6}}"
    found = score(pool_of("http", f"reward.http={http}"), 6)
    assert [item.value for item in found] == [0.5] * 6
    assert reward_server.most_at_once == 6


def test_the_time_limit_of_a_server_is_its_own(reward_server: RewardServer) -> None:
    """The pool would end the process that waits, and send its requests again."""
    reward_server.otherwise = lambda payload: Reply(halves(payload).body, delay=1.0)
    http = f"{{url: '{reward_server.url}', images_per_request: 1, timeout: 30}}"
    found = score(pool_of("http", f"reward.http={http}", "reward.timeout=0.1"), 2)
    assert [item.value for item in found] == [0.5] * 2 and len(reward_server.seen) == 2


@pytest.mark.parametrize(
    ("kind", "settings", "workers"),
    [
        ("http", ["reward.http.url=http://127.0.0.1:1"], 1),
        ("geneval", ["reward.geneval.detector=mask2former"], 1),
        ("ocr", [], 3),
        ("mix", ["reward.mix.weights={ocr: 1, clip: 1}"], 4),
    ],
)
def test_the_number_of_processes_is_for_rewards_on_the_cpu(kind: str, settings: list[str], workers: int) -> None:
    with pool_of(kind, "reward.workers=3", *settings) as pool:
        assert len(pool.pids) == workers


def test_by_default_they_share_the_cores() -> None:
    with pool_of("ocr") as pool:
        assert len(pool.pids) == 2
