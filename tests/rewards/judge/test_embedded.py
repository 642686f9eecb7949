"""The embedded judge: the network's promises with random weights, and what the shipped weights can do."""

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
from gdro_cli.errors import PrerequisiteError
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
from gdro_cli.tiny.world import Picture, foreground_mask, random_scene, random_sign

pytestmark = pytest.mark.slow

SHIFTS = dict.fromkeys(AXES, 0.0)
FAULTS = [(axis, fault) for axis, faults in (("coherence", COHERENCE), ("style", STYLE)) for fault in faults]
GOOD = 0.9
"""Rank correlation of severity and score from which the shipped judge is held to a fault."""


def network(*, seed: int = 0) -> JudgeNetwork:
    """Random weights, with heads large enough that images and prompts differ visibly."""
    torch.manual_seed(seed)
    made = JudgeNetwork(max(judge_vocabulary().values()) + 1)
    with torch.no_grad():
        made.fit[1].weight.mul_(8)
        made.looks[3].weight.mul_(8)
        made.words.weight.mul_(4)
    return made.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judge")
    save(network(), path, SHIFTS)
    return path


@pytest.fixture(scope="module")
def drawn() -> list[Picture]:
    rng = np.random.default_rng(21)
    return [random_sign(rng) if number % 2 else random_scene(rng) for number in range(20)]


def images_of(drawn: list[Picture]) -> list[Image.Image]:
    return [picture.image for picture in drawn]


def prompts_of(drawn: list[Picture]) -> list[str]:
    return [picture.prompt for picture in drawn]


def judged(judge: EmbeddedJudge, drawn: list[Picture]) -> np.ndarray:
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
        ('red, "a red"', [4, UNKNOWN, SPACE, UNKNOWN, UNKNOWN, UNKNOWN]),  # in quotes there are letters, no words
        ("", []),
    ],
)
def test_prompts_as_numbers(prompt: str, numbers: list[int]) -> None:
    assert word_numbers(prompt, WORDS) == numbers + [0] * (TEXT_LENGTH - len(numbers))


def test_a_prompt_that_is_too_long_is_cut_off() -> None:
    assert word_numbers("a red " * 40, WORDS) == [3, 4] * (TEXT_LENGTH // 2)
    assert word_numbers('a "' + "H" * 99 + '"', WORDS) == [3] + [7] * (TEXT_LENGTH - 1)


# --- what holds for any weights --------------------------------------------------------------------------------


def test_coherence_and_style_never_see_the_prompt_and_alignment_does(folder: Path, drawn: list[Picture]) -> None:
    judge = EmbeddedJudge(folder)
    own = judge.qualities(images_of(drawn), prompts_of(drawn))
    for others in (prompts_of(drawn)[::-1], [""] * len(drawn), ['a red sign that says "PERFECT"'] * len(drawn)):
        found = judge.qualities(images_of(drawn), others)
        assert torch.equal(found[:, 1:], own[:, 1:])
        assert (found[:, 0] - own[:, 0]).abs().max() > 1e-3


def test_all_axes_see_the_image(folder: Path, drawn: list[Picture]) -> None:
    found = EmbeddedJudge(folder).qualities(images_of(drawn), [drawn[0].prompt] * len(drawn))
    assert found.shape == (20, 3) and found.min() >= 0 and found.max() <= 1
    assert (found.std(dim=0) > 1e-3).all()


def test_an_image_gets_the_same_judgement_in_any_batch(folder: Path, drawn: list[Picture]) -> None:
    whole, single = (judged(EmbeddedJudge(folder, batch_size=size), drawn) for size in (32, 1))
    uneven = judged(EmbeddedJudge(folder, batch_size=7), drawn[::-1])[::-1]
    assert np.abs(whole - single).max() < 2e-3 and np.abs(whole - uneven).max() < 2e-3
    assert whole.std(axis=0).min() > 1e-2


def test_scores_by_hand(folder: Path, drawn: list[Picture]) -> None:
    """Not shifted: 1 + 4 q. Shifted by ln 3: odds of 1 to 1 become 1 to 3."""
    judge = EmbeddedJudge(folder)
    qualities = judge.qualities(images_of(drawn), prompts_of(drawn)).numpy()
    found = [[each.axes[axis] for axis in AXES] for each in judge.judge(images_of(drawn), prompts_of(drawn))]
    np.testing.assert_allclose(np.array(found, float), 1 + 4 * qualities, atol=1e-4)
    assert scaled(torch.tensor([0.0, 0.5, 0.75, 1.0]), math.log(3)) == [1.0, 2.0, 3.0, 5.0]


def test_the_shift_to_a_mean() -> None:
    qualities = torch.tensor([0.99, 0.9, 0.2])
    assert np.mean(scaled(qualities, shift_to(3.4, qualities))) == pytest.approx(3.4, abs=1e-3)
    assert shift_to(3.0, torch.tensor([0.75])) == pytest.approx(math.log(3), abs=1e-3)


def test_images_of_other_sizes_are_brought_to_the_judge_s(folder: Path, drawn: list[Picture]) -> None:
    """Each pixel as a block of 2 x 2 is averaged back to what it was."""
    judge = EmbeddedJudge(folder)
    large = [image.resize((128, 128), Image.Resampling.NEAREST) for image in images_of(drawn)]
    small = judge.judge(images_of(drawn), prompts_of(drawn))
    assert judge.judge(large, prompts_of(drawn)) == small
    mixed = [Image.new("RGB", size) for size in ((7, 5), (64, 64), (1024, 640))] + [Image.new("L", (64, 64))]
    assert all(each.reason is None for each in judge.judge(mixed, ["a circle"] * 4))


def test_an_image_that_cannot_be_read_is_missing_and_the_others_are_not(
    folder: Path, drawn: list[Picture], tmp_path: Path
) -> None:
    good, broken = tmp_path / "good.png", tmp_path / "broken.png"
    drawn[0].image.save(good)
    broken.write_bytes(good.read_bytes()[:60])
    judge = EmbeddedJudge(folder)
    prompt = drawn[0].prompt
    first, lost, again = judge.judge([drawn[0].image, broken, good], [prompt] * 3)
    assert lost.reason is not None and str(broken) in lost.reason and lost.axes == dict.fromkeys(AXES)
    assert first == again and first.reason is None
    (only,) = judge.judge([broken], [prompt])
    assert only == lost
    assert judge.judge([], []) == []


def test_a_loaded_judge_travels_without_its_network(folder: Path, drawn: list[Picture]) -> None:
    judge = EmbeddedJudge(folder)
    fresh = pickle.dumps(judge)
    before = judged(judge, drawn[:3])
    sent = pickle.dumps(judge)
    assert len(sent) == len(fresh) < 10_000  # 1.4 million weights would be 5.8 MB
    copy = pickle.loads(sent)
    assert copy.version == judge.version
    assert np.array_equal(judged(copy, drawn[:3]), before)


def test_provenance_names_weights_and_calibration(folder: Path, tmp_path: Path) -> None:
    version = EmbeddedJudge(folder).version
    assert version["judge"] == "embedded" and set(version["files"]) == {"config.json", "model.safetensors"}
    save(network(), tmp_path, SHIFTS)
    assert EmbeddedJudge(tmp_path).version == version
    save(network(), tmp_path, {**SHIFTS, "style": 0.4})
    other = EmbeddedJudge(tmp_path).version["files"]
    assert other["model.safetensors"] == version["files"]["model.safetensors"]
    assert other["config.json"] != version["files"]["config.json"]


def test_missing_files_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PrerequisiteError, match="missing or incomplete: reinstall"):
        EmbeddedJudge(tmp_path / "nowhere")
    for name in ("config.json", "model.safetensors"):
        save(network(), tmp_path, SHIFTS)
        (tmp_path / name).unlink()
        with pytest.raises(PrerequisiteError, match="missing or incomplete: reinstall"):
            EmbeddedJudge(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"calibration": {}}',
        '{"vocabulary": {}, "calibration": {"alignment": 0.5, "coherence": 0.5, "style": 0.5}}',
        '{"vocabulary": {"a": 3}, "calibration": {"alignment": 0.5, "coherence": 0.5}}',
        '{"vocabulary": {"a": "x"}, "calibration": {"alignment": 0.5, "coherence": 0.5, "style": 0.5}}',
    ],
)
def test_a_damaged_configuration_is_one_sentence(tmp_path: Path, content: str) -> None:
    save(network(), tmp_path, SHIFTS)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(PrerequisiteError, match="missing or incomplete: reinstall"):
        EmbeddedJudge(tmp_path)


@pytest.mark.parametrize("damage", ["cut off", "no weights", "of another network"])
def test_damaged_weights_are_one_sentence(tmp_path: Path, damage: str) -> None:
    save(network(), tmp_path, SHIFTS)
    weights = tmp_path / "model.safetensors"
    if damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "no weights":
        weights.write_bytes(b"not a file of weights")
    else:
        save(JudgeNetwork(len(judge_vocabulary()) + 9), tmp_path, SHIFTS)
    judge = EmbeddedJudge(tmp_path)
    with pytest.raises(PrerequisiteError, match=r"model\.safetensors are damaged: reinstall"):
        judge.load()


# --- the shipped weights ---------------------------------------------------------------------------------------


@cache
def shipped() -> EmbeddedJudge:
    return EmbeddedJudge(tiny_judge_path())


@cache
def sample() -> dict[str, dict[str, float]]:
    """Rank correlations on 60 fresh images of each kind, and on 15 at nine severities."""
    return measure(tiny_judge_path(), pictures=60, seed=2)


def report() -> dict[str, dict[str, float]]:
    measured: dict[str, dict[str, float]] = json.loads((tiny_judge_path() / "report.json").read_text())
    return measured


@pytest.mark.parametrize(("axis", "fault"), FAULTS)
def test_ruined_images_are_judged_worse_than_clean_ones(axis: str, fault: str, drawn: list[Picture]) -> None:
    """Mean of 20 images on the fault's own axis, of 1 to 5."""
    ruined = [
        Image.fromarray(
            degrade(
                np.asarray(picture.image),
                fault,
                1.0,
                np.random.default_rng(seed),
                foreground=foreground_mask(picture),
            )
        )
        for seed, picture in enumerate(drawn)
    ]
    clean, worse = (shipped().judge(images, prompts_of(drawn)) for images in (images_of(drawn), ruined))
    means = [np.mean([float(each.axes[axis] or np.nan) for each in side]) for side in (clean, worse)]
    assert means[0] - means[1] > 0.5, means


@pytest.mark.parametrize(("axis", "fault"), FAULTS)
def test_the_score_follows_the_severity(axis: str, fault: str) -> None:
    """Of one image, and less closely from image to image."""
    name = f"{axis}: {fault}"
    assert report()[name]["within a picture"] >= GOOD
    assert sample()[name]["within a picture"] >= GOOD - 0.05  # 15 images
    assert sample()[name]["across pictures"] == pytest.approx(report()[name]["across pictures"], abs=0.2)


@pytest.mark.parametrize("kind", ["signs", "shapes"])
def test_alignment_follows_the_known_fit(kind: str) -> None:
    name = f"alignment: {kind}"
    assert sample()[name]["across pictures"] == pytest.approx(report()[name]["across pictures"], abs=0.2)
    assert sample()[name]["across pictures"] > 0.3


def test_own_prompts_fit_better_than_others(drawn: list[Picture]) -> None:
    own, other = (
        np.mean([each.axes["alignment"] for each in shipped().judge(images_of(drawn), prompts)])  # type: ignore[misc]
        for prompts in (prompts_of(drawn), prompts_of(drawn)[1:] + prompts_of(drawn)[:1])
    )
    assert own - other > 0.5


def test_the_report_is_of_every_fault() -> None:
    assert set(report()) == {f"{axis}: {fault}" for axis, fault in FAULTS} | {"alignment: signs", "alignment: shapes"}


def test_the_shipped_judge_is_calibrated() -> None:
    config = json.loads((tiny_judge_path() / "config.json").read_text())
    assert set(config["calibration"]) == set(AXES)
    assert config["calibration"] != SHIFTS
    assert config["vocabulary"] == judge_vocabulary()
