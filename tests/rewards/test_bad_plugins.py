"""Plug-ins that misbehave in a scoring process: each costs a sentence or one missing image, never the others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from gdro_cli.config.load import load_recipe
from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.rewards.base import Score
from gdro_cli.rewards.pool import ScoringPool
from gdro_cli.rewards.registry import open_reward
from tests.support.ocr_signs import ask
from tests.support.plugins import install

pytestmark = pytest.mark.slow

ODD = 13
"""Width of the image on which a reward misbehaves."""
CODE = """
import os, sys, threading, time
from gdro_cli.rewards import *

class Odd(Reward):
    name, purpose, version = "odd", "to be odd", {{"reward": "odd"}}
    scale = (0.0, 100.0)
    {extra}
    def score_image(self, image, prompt):
        if image.width == 13:
            {body}
        return float(image.width)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("odd_reward", None)


def pool(site: Path, *, body: str = "pass", extra: str = "", timeout: float | None = None) -> ScoringPool:
    """A scoring process with the plug-in, as a job opens it."""
    install(site, "odd", CODE.format(body=body, extra=extra), target="Odd")
    reward = open_reward(load_recipe("ocr", overrides=["reward.kind=odd"]).reward)
    return ScoringPool(reward, workers=1, timeout=timeout)


def score(opened: ScoringPool, *widths: int) -> list[Score]:
    with opened as workers:
        return workers.score([Image.new("RGB", (width, 8)) for width in widths], [ask("A")] * len(widths))


WIDTHS = (5, 6, ODD, 7, 8)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise KeyError('x')", "the reward odd failed on this image: KeyError: 'x'"),
        ("return float('nan')", "the reward odd failed on this image: ValueError: a score is a finite number, not nan"),
        ("return '0.5'", "the reward odd failed on this image: TypeError: a score is a number, not the text '0.5'"),
        ("return [1]", "the reward odd failed on this image: TypeError"),
        ("return None", "the reward odd failed on this image: ValueError: a score has a value, or a reason"),
        ("return Score(1, None, {'a': object()})", "the reward odd failed on this image: TypeError"),
        ("return Score('1')", "the reward odd failed on this image: TypeError: a score is a number, not the text '1'"),
        ("return type('S', (Score,), {})(1)", "the reward gave values of the type S instead of Score"),
        ("sys.exit(3)", "the scoring worker died on this image (exit code 3)"),
        ("os._exit(4)", "the scoring worker died on this image (exit code 4)"),
        ("os.abort()", "the scoring worker died on this image (exit code -6)"),
    ],
)
def test_one_missing_image(site: Path, body: str, reason: str) -> None:
    found = score(pool(site, body=body), *WIDTHS)
    assert [item.value for item in found] == [5, 6, None, 7, 8]
    assert str(found[2].reason).startswith(reason)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("[Score(1.0)] * (len(images) - 1)", "the reward gave 0 scores for 1 images"),
        ("[Score(1.0)] * 9", "the reward gave 9 scores for 1 images"),
        ("None", "the reward failed on this image: TypeError: 'NoneType' object is not iterable"),
        ("['1'] * len(images)", "the reward gave values of the type str instead of Score"),
        ("[float('nan')] * len(images)", "the reward gave values of the type float instead of Score"),
    ],
)
def test_a_batch_of_wrong_length_or_type(site: Path, answer: str, reason: str) -> None:
    found = score(pool(site, extra=f"def score(self, images, prompts): return {answer}"), 5, 6)
    assert [item.reason for item in found] == [reason] * 2


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("def load(self): 1 / 0", "the reward odd cannot be loaded (ZeroDivisionError: division by zero): correct it"),
        ("def load(self): raise PrerequisiteError('no weights')", "no weights"),
        ("def load(self): sys.exit(3)", "a scoring worker ended while it started (exit code 3)"),
        (
            "def __init__(self, settings): super().__init__(settings); self.lock = threading.Lock()",
            "the reward odd cannot be sent to its scoring processes (TypeError: cannot pickle '_thread.lock' object)",
        ),
    ],
)
def test_what_concerns_every_image_is_one_sentence(site: Path, extra: str, words: str) -> None:
    with pytest.raises(PrerequisiteError) as caught:
        score(pool(site, extra=extra), *WIDTHS)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_error_of_a_class_that_only_the_plug_in_has(site: Path) -> None:
    """The parent could not make it again from its message alone."""
    extra = "class Mine(UserError):\n        def __init__(self, a, b): super().__init__(a + b)"
    with pytest.raises(UserError, match="^one two$"):
        score(pool(site, body="raise self.Mine('one ', 'two')", extra=extra), *WIDTHS)


@pytest.mark.parametrize("method", ["score_image", "score"])
def test_a_value_outside_the_scale_is_missing(site: Path, method: str) -> None:
    """Whether the base class or the plug-in makes the scores."""
    code = CODE.format(body="pass", extra="")
    if method == "score":
        code = code.replace("score_image(self, image, prompt)", "score_one(self, image)")
        code += (
            "    def score(self, images, prompts):\n        return [Score(self.score_one(i), None) for i in images]\n"
        )
    install(site, "odd", code, target="Odd")
    found = score(ScoringPool(open_reward(load_recipe("ocr", overrides=["reward.kind=odd"]).reward), workers=1), 7, 101)
    reason = "the reward odd gave 101, outside its scale (0 to 100): correct the class attribute `scale`"
    assert found == [Score(7.0), Score(None, reason)]


@pytest.mark.parametrize("chunk", [1, 40], ids=["alone", "among others"])
def test_a_reward_that_hangs_costs_its_image(site: Path, chunk: int) -> None:
    """The process is ended and replaced; the images that it had beside that one are scored by the next."""
    widths = [*range(20, 20 + chunk // 2), ODD, *range(70, 70 + chunk // 2)]
    found = score(pool(site, body="time.sleep(3600)", timeout=0.5), *widths)
    assert [item.value for item in found] == [None if width == ODD else width for width in widths]
    assert found[widths.index(ODD)].reason == "the reward took longer than 0.5 s on this image (reward.timeout)"


def test_a_reward_that_always_hangs_ends_the_scoring(site: Path) -> None:
    with pytest.raises(PrerequisiteError, match=r"longer than 0.2 s for each of 6 images in a row: raise rew"):
        score(pool(site, body="time.sleep(3600)", timeout=0.2), *[ODD] * 12)


def test_the_time_limit_is_for_each_image_and_not_for_all(site: Path) -> None:
    body = f"time.sleep(0.15); open({str(site / 'calls')!r}, 'a').write('x')"
    found = score(pool(site, body=body, timeout=0.6), *[ODD] * 32)
    assert [item.value for item in found] == [ODD] * 32
    assert len((site / "calls").read_text()) == 32  # none was tried again


@pytest.mark.parametrize(
    "body",
    [
        "os.fork() == 0 or time.sleep(0.5)",  # both processes return, the copy first: only one may answer
        "if os.fork() == 0: time.sleep(3600)",
        "if os.fork() == 0: raise KeyError",
        "if os.fork() == 0: sys.exit(3)",
    ],
)
def test_a_reward_that_forks(site: Path, body: str) -> None:
    assert [item.value for item in score(pool(site, body=body), *WIDTHS)] == [5, 6, ODD, 7, 8]


def test_a_process_that_dies_and_leaves_a_fork_with_its_pipe(site: Path) -> None:
    """The pipe stays open, so its end does not tell that the scoring process is gone."""
    body = "(time.sleep(3600) if os.fork() == 0 else os._exit(5))"
    found = score(pool(site, body=body), *WIDTHS)
    assert [item.value for item in found] == [5, 6, None, 7, 8]
    assert found[2].reason == "the scoring worker died on this image (exit code 5)"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
def test_what_a_reward_starts_ends_with_the_pool(site: Path) -> None:
    body = "import subprocess; return Score(1, None, {'pid': subprocess.Popen(['sleep', '3600']).pid})"
    with pool(site, body=body) as workers:
        (found,) = workers.score([Image.new("RGB", (ODD, 8))], [ask("A")])
        assert Path(f"/proc/{found.details['pid']}").exists()
    deadline = time.monotonic() + 20
    while _runs(found.details["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(found.details["pid"])


PRINTS = """
import sys
from PIL import Image
from gdro_cli.config.load import load_recipe
from gdro_cli.rewards.pool import ScoringPool
from gdro_cli.rewards.registry import open_reward
class P: prompt, target, metadata = "p", None, {}
if __name__ == "__main__":
    reward = open_reward(load_recipe("ocr", overrides=["reward.kind=odd"]).reward)
    with ScoringPool(reward, workers=1) as pool:
        print([score.value for score in pool.score([Image.new("RGB", (width, 8)) for width in (5, 13)], [P] * 2)])
"""


def test_what_a_reward_prints_is_not_in_the_results(site: Path) -> None:
    body = "print('x' * 5_000_000); os.write(1, b'y' * 100_000)"
    install(site, "odd", "print('imported')\n" + CODE.format(body=body, extra=""), target="Odd")
    script = site / "prints.py"
    script.write_text(PRINTS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(Path(__file__).parents[2])])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[5.0, 13.0]\n"
    assert len(done.stderr) > 5_000_000 and "imported" in done.stderr


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
