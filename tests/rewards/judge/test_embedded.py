"""The embedded judge: what holds for any weights, and the quality of the shipped weights."""

from __future__ import annotations

import json
import math
import pickle
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gdro_cli.embedded import tiny_judge_path
from gdro_cli.rewards.judge.base import AXES
from gdro_cli.rewards.judge.embedded import (
    SPACE,
    TEXT_LENGTH,
    UNKNOWN,
    EmbeddedJudge,
    JudgeNetwork,
    scaled,
    word_numbers,
)
from gdro_cli.tiny.degrade import COHERENCE, STYLE, degrade
from gdro_cli.tiny.judge_data import judge_vocabulary
from gdro_cli.tiny.train_judge import measure, save, shift_to
from gdro_cli.tiny.world import Drawing, foreground_mask, random_scene, random_sign

pytestmark = pytest.mark.slow

SHIFTS = dict.fromkeys(AXES, 0.0)
FAULTS = [(axis, fault) for axis, faults in (("coherence", COHERENCE), ("style", STYLE)) for fault in faults]
GOOD = 0.9
"""Rank correlation of severity and score that the shipped judge reaches for each fault."""


def network(*, seed: int = 0) -> JudgeNetwork:
    """Random weights, with heads so large that images and prompts get clearly different scores."""
    torch.manual_seed(seed)
    judge = JudgeNetwork(max(judge_vocabulary().values()) + 1)
    with torch.no_grad():
        judge.fit[1].weight.mul_(8)
        judge.looks[3].weight.mul_(8)
        judge.words.weight.mul_(4)
    return judge.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judge")
    save(network(), path, SHIFTS)
    return path


@pytest.fixture(scope="module")
def drawn() -> list[Drawing]:
    rng = np.random.default_rng(21)
    return [random_sign(rng) if number % 2 else random_scene(rng) for number in range(20)]


def images_of(drawn: list[Drawing]) -> list[Image.Image]:
    return [drawing.image for drawing in drawn]


def prompts_of(drawn: list[Drawing]) -> list[str]:
    return [drawing.prompt for drawing in drawn]


def judged(judge: EmbeddedJudge, drawn: list[Drawing]) -> np.ndarray:
    """[N, 3]."""
    judgements = judge.judge(images_of(drawn), prompts_of(drawn))
    return np.array([[judgement.axes[axis] for axis in AXES] for judgement in judgements], float)


# --- words ---------------------------------------------------------------------------------------------------

WORDS = {"a": 3, "red": 4, "sign": 5, "says": 6, "H": 7, "I": 8}


@pytest.mark.parametrize(
    ("prompt", "numbers"),
    [
        ('a red sign says "HI"', [3, 4, 5, 6, 7, 8]),
        ("a red sign says \u201cHI\u201d", [3, 4, 5, 6, 7, 8]),
        ("a red sign says \u201eHI\u201c", [3, 4, 5, 6, 7, 8]),
        ('A Red sign says: "hi"', [3, 4, 5, 6, 7, 8]),
        ('"H I"', [7, SPACE, 8]),
        ('a "HQ', [3, 7, UNKNOWN]),  # no closing quote
        ("a purple sign", [3, UNKNOWN, 5]),
        ('red, "a red"', [4, UNKNOWN, SPACE, UNKNOWN, UNKNOWN, UNKNOWN]),  # quotes contain letters, not words
        ("", []),
    ],
)
def test_prompts_as_numbers(prompt: str, numbers: list[int]) -> None:
    assert word_numbers(prompt, WORDS) == numbers + [0] * (TEXT_LENGTH - len(numbers))


def test_a_prompt_that_is_too_long_is_cut_off() -> None:
    assert word_numbers("a red " * 40, WORDS) == [3, 4] * (TEXT_LENGTH // 2)
    assert word_numbers('a "' + "H" * 99 + '"', WORDS) == [3] + [7] * (TEXT_LENGTH - 1)


# --- what holds for any weights --------------------------------------------------------------------------------


def test_coherence_and_style_never_see_the_prompt_and_alignment_does(folder: Path, drawn: list[Drawing]) -> None:
    judge = EmbeddedJudge(folder)
    own = judge.qualities(images_of(drawn), prompts_of(drawn))
    for prompts in (prompts_of(drawn)[::-1], [""] * len(drawn), ['a red sign that says "PERFECT"'] * len(drawn)):
        other = judge.qualities(images_of(drawn), prompts)
        assert torch.equal(other[:, 1:], own[:, 1:])
        assert (other[:, 0] - own[:, 0]).abs().max() > 1e-3


def test_all_axes_see_the_image(folder: Path, drawn: list[Drawing]) -> None:
    qualities = EmbeddedJudge(folder).qualities(images_of(drawn), [drawn[0].prompt] * len(drawn))
    assert qualities.shape == (20, 3) and qualities.min() >= 0 and qualities.max() <= 1
    assert (qualities.std(dim=0) > 1e-3).all()


def test_an_image_gets_the_same_judgement_in_any_batch(folder: Path, drawn: list[Drawing]) -> None:
    judge = EmbeddedJudge(folder)
    together = judged(judge, drawn)
    alone = np.concatenate([judged(judge, [drawing]) for drawing in drawn])
    assert np.abs(together - alone).max() < 2e-3
    assert together.std(axis=0).min() > 1e-2


def test_scores_by_hand(folder: Path, drawn: list[Drawing]) -> None:
    """Not shifted: 1 + 4 q. Shifted by ln 3: odds of 1 to 1 become 1 to 3."""
    judge = EmbeddedJudge(folder)
    qualities = judge.qualities(images_of(drawn), prompts_of(drawn)).numpy()
    np.testing.assert_allclose(judged(judge, drawn), 1 + 4 * qualities, atol=1e-4)
    assert scaled(torch.tensor([0.0, 0.5, 0.75, 1.0]), math.log(3)) == [1.0, 2.0, 3.0, 5.0]


def test_the_shift_to_a_mean() -> None:
    qualities = torch.tensor([0.99, 0.9, 0.2])
    assert np.mean(scaled(qualities, shift_to(3.4, qualities))) == pytest.approx(3.4, abs=1e-3)
    assert shift_to(3.0, torch.tensor([0.75])) == pytest.approx(math.log(3), abs=1e-3)


def test_images_of_other_sizes_are_resized(folder: Path, drawn: list[Drawing]) -> None:
    """Each pixel enlarged to 2 x 2 is averaged back to its own value."""
    judge = EmbeddedJudge(folder)
    large = [image.resize((128, 128), Image.Resampling.NEAREST) for image in images_of(drawn)]
    small = judge.judge(images_of(drawn), prompts_of(drawn))
    assert judge.judge(large, prompts_of(drawn)) == small
    mixed = [Image.new("RGB", size) for size in ((7, 5), (64, 64), (1024, 640))] + [Image.new("L", (64, 64))]
    assert all(judgement.reason is None for judgement in judge.judge(mixed, ["a circle"] * 4))


def test_an_image_that_cannot_be_decoded_is_missing_and_the_others_are_not(
    folder: Path, drawn: list[Drawing], tmp_path: Path
) -> None:
    good, broken = tmp_path / "good.png", tmp_path / "broken.png"
    drawn[0].image.save(good)
    broken.write_bytes(good.read_bytes()[:60])
    judge = EmbeddedJudge(folder)
    prompt = drawn[0].prompt
    first, missing, again = judge.judge([drawn[0].image, broken, good], [prompt] * 3)
    assert missing.reason is not None and str(broken) in missing.reason and missing.axes == dict.fromkeys(AXES)
    assert first == again and first.reason is None
    assert judge.judge([broken], [prompt]) == [missing]
    assert judge.judge([], []) == []


def test_a_loaded_judge_is_pickled_without_its_network(folder: Path, drawn: list[Drawing]) -> None:
    judge = EmbeddedJudge(folder)
    unloaded = pickle.dumps(judge)
    scores = judged(judge, drawn[:3])
    pickled = pickle.dumps(judge)
    assert len(pickled) == len(unloaded) < 10_000  # 1.4 million weights would be 5.8 MB
    copy = pickle.loads(pickled)
    assert copy.version == judge.version
    assert np.array_equal(judged(copy, drawn[:3]), scores)


def test_provenance_covers_weights_and_calibration(folder: Path, tmp_path: Path) -> None:
    version = EmbeddedJudge(folder).version
    assert version["judge"] == "embedded" and set(version["files"]) == {"config.json", "model.safetensors"}
    save(network(), tmp_path, SHIFTS)
    assert EmbeddedJudge(tmp_path).version == version
    save(network(), tmp_path, {**SHIFTS, "style": 0.4})
    other = EmbeddedJudge(tmp_path).version["files"]
    assert other["model.safetensors"] == version["files"]["model.safetensors"]
    assert other["config.json"] != version["files"]["config.json"]


# --- the shipped weights ---------------------------------------------------------------------------------------


@cache
def shipped() -> EmbeddedJudge:
    return EmbeddedJudge(tiny_judge_path())


@cache
def sample() -> dict[str, dict[str, float]]:
    """Rank correlations on 60 fresh images per fault, and on 15 at nine severities each."""
    return measure(tiny_judge_path(), images=60, seed=2)


def report() -> dict[str, dict[str, float]]:
    shipped_report: dict[str, dict[str, float]] = json.loads((tiny_judge_path() / "report.json").read_text())
    return shipped_report


@pytest.mark.parametrize(("axis", "fault"), FAULTS)
def test_ruined_images_are_judged_worse_than_clean_ones(axis: str, fault: str, drawn: list[Drawing]) -> None:
    """Mean of 20 images on the fault's own axis, from 1 to 5."""
    ruined = []
    for seed, drawing in enumerate(drawn):
        pixels, rng = np.asarray(drawing.image), np.random.default_rng(seed)
        ruined.append(Image.fromarray(degrade(pixels, fault, 1.0, rng, foreground=foreground_mask(drawing))))
    clean, worse = (shipped().judge(images, prompts_of(drawn)) for images in (images_of(drawn), ruined))
    means = [np.mean([float(judgement.axes[axis] or np.nan) for judgement in side]) for side in (clean, worse)]
    assert means[0] - means[1] > 0.5, means


@pytest.mark.parametrize(("axis", "fault"), FAULTS)
def test_the_score_follows_the_severity(axis: str, fault: str) -> None:
    """Closely within one image, and less closely across images."""
    name = f"{axis}: {fault}"
    assert report()[name]["within an image"] >= GOOD
    assert sample()[name]["within an image"] >= GOOD - 0.05  # 15 images
    assert sample()[name]["across images"] == pytest.approx(report()[name]["across images"], abs=0.2)


@pytest.mark.parametrize("kind", ["signs", "shapes"])
def test_alignment_follows_the_known_fit(kind: str) -> None:
    name = f"alignment: {kind}"
    assert sample()[name]["across images"] == pytest.approx(report()[name]["across images"], abs=0.2)
    assert sample()[name]["across images"] > 0.3


def test_own_prompts_fit_better_than_others(drawn: list[Drawing]) -> None:
    images, prompts = images_of(drawn), prompts_of(drawn)
    own, other = (shipped().judge(images, texts) for texts in (prompts, prompts[1:] + prompts[:1]))
    means = [np.mean([float(judgement.axes["alignment"] or np.nan) for judgement in side]) for side in (own, other)]
    assert means[0] - means[1] > 0.5, means


def test_the_report_covers_every_fault() -> None:
    assert set(report()) == {f"{axis}: {fault}" for axis, fault in FAULTS} | {"alignment: signs", "alignment: shapes"}


def test_the_shipped_judge_is_calibrated() -> None:
    config = json.loads((tiny_judge_path() / "config.json").read_text())
    assert set(config["calibration"]) == set(AXES)
    assert config["calibration"] != SHIFTS
    assert config["vocabulary"] == judge_vocabulary()
