"""Scoring on several processes: order, failures, crashes, signals."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from gdro_cli.errors import Interrupted, PrerequisiteError, UserError
from gdro_cli.rewards import pool as pool_module
from gdro_cli.rewards.base import ImageSource
from gdro_cli.rewards.ocr.reward import OcrReward
from gdro_cli.rewards.pool import ScoringPool, usable_cores
from tests.support.breaking_rewards import (
    HANGS,
    KILLS,
    KILLS_ONCE,
    RAISES,
    WITHOUT_TARGET,
    DiesWhileLoading,
    GpuReward,
    NotFinite,
    OtherTypes,
    StartsOnce,
    ThreadsReward,
    Unloadable,
    WidthReward,
)
from tests.support.ocr_signs import Prompt, ask, sign

pytestmark = pytest.mark.slow

WORDS = ["HELLO", "HOTEL", "BREAD", "TIGER", "WINDOW", "MARKET"]


def widths(*values: int) -> list[ImageSource]:
    return [Image.new("RGB", (width, 8)) for width in values]


def prompts(images: Sequence[ImageSource]) -> list[Prompt]:
    return [ask("A")] * len(images)


def test_real_ocr_on_two_workers_equals_one_process(reward: OcrReward, tmp_path: Path) -> None:
    images: list[ImageSource] = [sign([word], colour="#2850be") for word in WORDS]
    for index in (1, 4):  # images and paths may be mixed
        path = tmp_path / f"{index}.png"
        images[index].save(path)  # type: ignore[union-attr]
        images[index] = path
    signs = [ask(word) for word in WORDS[:-1]] + [ask("OTHERS")]
    with ScoringPool(reward, workers=2) as pool:
        scores = pool.score(images, signs)
        again = pool.score(images[:2], signs[:2])
    assert scores == reward.score(images, signs)
    assert again == scores[:2]
    assert [score.details["text"] for score in scores] == WORDS


def test_order_is_kept_and_work_is_shared() -> None:
    images = widths(*range(100, 160))
    done: list[int] = []
    with ScoringPool(WidthReward(), workers=2) as pool:
        scores = pool.score(images, prompts(images), on_scored=done.append)
    assert [score.value for score in scores] == [float(width) for width in range(100, 160)]
    assert sum(done) == 60
    assert os.getpid() not in {score.details["pid"] for score in scores}


@pytest.mark.parametrize("workers", [1, usable_cores()])
def test_the_workers_threads_do_not_depend_on_the_parents_variables(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch reads the variables when it is imported; here, that is while the reward is unpickled."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(usable_cores() + 1))
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    images = widths(8)
    with ScoringPool(ThreadsReward(), workers=workers) as pool:
        (score,) = pool.score(images, prompts(images))
    assert score.value == max(1, usable_cores() // workers)
    assert os.environ["OMP_NUM_THREADS"] == str(usable_cores() + 1) and "MKL_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    ("visible", "own", "seen"),
    [(None, None, None), ("2,3", None, "2,3"), (None, 1, "1"), ("2, 3", 1, "3"), ("GPU-aa,GPU-bb", 0, "GPU-aa")],
)
def test_workers_see_only_the_gpu_of_their_parent(
    visible: str | None, own: int | None, seen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the workers of all processes of a job would load their models on the first GPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: own is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: own)
    images = widths(8)
    with ScoringPool(GpuReward(), workers=1) as pool:
        (score,) = pool.score(images, prompts(images))
    assert score.details["gpus"] == seen
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_no_images() -> None:
    with ScoringPool(WidthReward(), workers=1) as pool:
        assert pool.score([], []) == []


def test_broken_images_are_missing(tmp_path: Path) -> None:
    good, cut = tmp_path / "good.png", tmp_path / "cut.png"
    Image.effect_noise((40, 40), 50).save(good)
    cut.write_bytes(good.read_bytes()[:400])
    opened = Image.open(cut)  # opening works; decoding fails, in the parent
    images: list[ImageSource] = [good, cut, opened, *widths(7)]
    with ScoringPool(WidthReward(), workers=2) as pool:
        scores = pool.score(images, prompts(images))
    assert [score.value for score in scores] == [40.0, None, None, 7.0]
    assert all("cannot be decoded" in (score.reason or "") for score in scores[1:3])


def test_a_crash_costs_only_the_image_that_caused_it() -> None:
    images = widths(*range(100, 120), KILLS, *range(120, 140))
    with ScoringPool(WidthReward(), workers=2) as pool:
        scores = pool.score(images, prompts(images))
        assert pool.score(widths(5), prompts(widths(5)))[0].value == 5.0
    assert [i for i, score in enumerate(scores) if score.value is None] == [20]
    assert "died on this image (exit code -9)" in (scores[20].reason or "")


def test_scoring_ends_if_every_worker_dies() -> None:
    images = widths(*[KILLS] * 20)
    with ScoringPool(WidthReward(), workers=2) as pool, pytest.raises(PrerequisiteError, match="in a row died at work"):
        pool.score(images, prompts(images))


def test_an_image_whose_worker_crashed_is_tried_again(tmp_path: Path) -> None:
    images = widths(100, KILLS_ONCE, 101)
    with ScoringPool(WidthReward(tmp_path), workers=1) as pool:
        scores = pool.score(images, prompts(images))
    assert (tmp_path / "killed").exists()
    assert [score.value for score in scores] == [100.0, float(KILLS_ONCE), 101.0]


def test_an_exception_of_the_reward_costs_only_its_image() -> None:
    images = widths(*range(100, 120), RAISES, 120)
    with ScoringPool(WidthReward(), workers=1) as pool:
        scores = pool.score(images, prompts(images))
    assert [i for i, score in enumerate(scores) if score.value is None] == [20]
    assert "RuntimeError: seventeen" in (scores[20].reason or "")


def test_a_score_of_a_wrong_type_or_not_finite_is_missing() -> None:
    images = widths(5, RAISES + 1)
    with ScoringPool(OtherTypes(), workers=1) as pool:
        scores = pool.score(images, prompts(images))
    assert [score.reason for score in scores] == ["the reward gave values of the type float instead of Score"] * 2
    with ScoringPool(NotFinite(), workers=1) as pool:
        scores = pool.score(images, prompts(images))
    assert [score.value for score in scores] == [5.0, None]
    assert scores[1].reason == "the reward failed on this image: ValueError: a score is a finite number, not nan"


def test_errors_for_the_user_are_raised_and_close_the_pool() -> None:
    images = widths(5, 6)
    with ScoringPool(WidthReward(), workers=1) as pool:
        with pytest.raises(UserError, match="no target"):
            pool.score(images, [ask("A"), Prompt(WITHOUT_TARGET, None)])
        with pytest.raises(ValueError, match="not open"):
            pool.score(images, prompts(images))
    with (
        ScoringPool(Unloadable(), workers=2) as pool,
        pytest.raises(PrerequisiteError, match="weights are missing"),
    ):
        pool.score(images, prompts(images))
    with (
        ScoringPool(DiesWhileLoading(), workers=1) as pool,
        pytest.raises(PrerequisiteError, match="exit code 3"),
    ):
        pool.score(images, prompts(images))


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match="at least one worker"):
        ScoringPool(WidthReward(), workers=0)
    with pytest.raises(ValueError, match="not open"):
        ScoringPool(WidthReward(), workers=1).score(widths(1), prompts(widths(1)))
    with ScoringPool(WidthReward(), workers=1) as pool, pytest.raises(ValueError, match="1 images but 0"):
        pool.score(widths(1), [])
    assert usable_cores() >= 1


Processes = Callable[[], set[multiprocessing.process.BaseProcess]]


@pytest.fixture
def workers_left() -> Processes:
    """The scoring processes that the test has started and that still run; others may wait for later tests."""

    def running() -> set[multiprocessing.process.BaseProcess]:
        return {child for child in multiprocessing.active_children() if child.name == "gdro-scoring"}

    before = running()
    return lambda: running() - before


def test_an_interruption_of_the_parent_ends_the_workers(workers_left: Processes) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    images = widths(*range(100, 130))
    pool = ScoringPool(WidthReward(), workers=2)
    with pytest.raises(KeyboardInterrupt), pool:
        pool.score(images, prompts(images), on_scored=interrupt)
    assert not workers_left()


def test_if_a_worker_cannot_be_started_the_others_are_ended(workers_left: Processes) -> None:
    with pytest.raises(PrerequisiteError, match=r"cannot be started \(Resource .*\): try fewer workers"):
        ScoringPool(StartsOnce(), workers=2).__enter__()
    assert not workers_left()


def test_a_stop_ends_a_reward_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers_left: Processes
) -> None:
    """The stop is requested once the reward hangs. The worker is ended and the pool is closed."""
    monkeypatch.setattr(pool_module, "STOP_GRACE", 0.1)
    images = widths(100, HANGS)
    with ScoringPool(WidthReward(tmp_path), workers=1) as pool:
        with pytest.raises(Interrupted, match="run the command again"):
            pool.score(images, prompts(images), stop=(tmp_path / "hangs").exists)
        assert not workers_left()
        with pytest.raises(ValueError, match="not open"):
            pool.score(images, prompts(images))
    assert (tmp_path / "hangs").exists()


def test_a_stop_waits_for_work_that_is_nearly_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "STOP_GRACE", 120.0)
    images = widths(100, 101)
    with ScoringPool(WidthReward(), workers=1) as pool:
        scores = pool.score(images, prompts(images), stop=lambda: True)
    assert [score.value for score in scores] == [100.0, 101.0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_workers_ignore_the_signals_that_stop_the_parent(number: signal.Signals, workers_left: Processes) -> None:
    images = widths(*range(100, 110))
    with ScoringPool(WidthReward(), workers=2) as pool:
        started = {child.pid for child in workers_left()}
        for pid in started:  # as early as possible: while they start
            assert pid is not None
            os.kill(pid, number)
        pids = {score.details["pid"] for score in pool.score(images, prompts(images))}
        for pid in pids:
            os.kill(pid, number)
        scores = pool.score(images, prompts(images))
    assert {score.details["pid"] for score in scores} <= started and pids <= started
    assert [score.value for score in scores] == [float(width) for width in range(100, 110)]


ORPHANS = """
import multiprocessing, os, signal, sys, threading, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.support.breaking_rewards import HANGS, WidthReward
from PIL import Image
from gdro_cli.rewards.pool import ScoringPool
marks, width = Path(sys.argv[2]), HANGS if sys.argv[3] == "hanging" else 5
class P: prompt, target, metadata = "p", "A", {}
def kill():
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
def kill_later():
    while not (marks / "hangs").exists():
        time.sleep(0.05)
    kill()
if __name__ == "__main__":
    with ScoringPool(WidthReward(marks), workers=2) as pool:
        threading.Thread(target=kill_later).start()
        pool.score([Image.new("RGB", (width, 5))] * 8, [P()] * 8)
        kill()
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
@pytest.mark.parametrize("state", ["idle", "hanging"])
def test_workers_end_when_the_parent_is_killed(state: str, tmp_path: Path) -> None:
    """Even if their reward never returns."""
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    command = [sys.executable, str(script), str(Path(__file__).parents[2]), str(tmp_path), state]
    parent = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    pids = [int(pid) for pid in parent.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_runs(pid) for pid in pids)


UNCLOSED = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.support.breaking_rewards import WidthReward
from gdro_cli.rewards.pool import ScoringPool
if __name__ == "__main__":
    pool = ScoringPool(WidthReward(), workers=1).__enter__()
    sys.exit(7)
"""


def test_a_program_that_never_closes_its_pool_still_ends(tmp_path: Path) -> None:
    script = tmp_path / "unclosed.py"
    script.write_text(UNCLOSED)
    command = [sys.executable, str(script), str(Path(__file__).parents[2])]
    assert subprocess.run(command, timeout=60, check=False).returncode == 7


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"
