"""The judge's training data: metadata of prompts, fits and cells, worked out by hand."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from gdro_cli.rewards.judge.embedded import SPACE, TEXT_LENGTH, UNKNOWN, word_numbers
from gdro_cli.tiny.degrade import COHERENCE, STYLE
from gdro_cli.tiny.judge_data import (
    Content,
    draw_example,
    draw_shapes_content,
    draw_sign_content,
    fit_of,
    judge_vocabulary,
    letter_cells,
    lines_of,
    metadata_of,
    repeated_sign,
    scene_fit,
    thing_cells,
)
from gdro_cli.tiny.world import (
    ALPHABET,
    COLOURS,
    SHAPES,
    TAGS,
    Drawing,
    Thing,
    draw_sign,
    draw_things,
    ocr_prompt,
    plan_scene,
)


def sign(text: str = "HELLO") -> Content:
    drawing = draw_sign(text, colour="red", background="brick", rng=np.random.default_rng(0), place=(1, 1))
    return Content(drawing, text, "red")


def shapes(*things: Thing) -> Content:
    image = draw_things(things, background="sandy", rng=np.random.default_rng(0))
    return Content(Drawing(image, "-", "sandy", things=things), "", None)


CIRCLE, STAR = Thing("circle", "red", 0, 0), Thing("star", "blue", 0, 3)


@pytest.mark.parametrize(
    ("prompt", "fit"),
    [
        (ocr_prompt("HELLO", "red", "brick"), 1.0),  # 0.6 text + 0.2 colour + 0.2 background
        (ocr_prompt("HELLO", "blue", "brick"), 0.8),
        (ocr_prompt("HELLO", "red", "sandy"), 0.8),
        (ocr_prompt("HELPO", "red", "brick"), 0.88),  # 0.6 x 4/5 + 0.4
        (ocr_prompt("HELL", "red", "brick"), 0.88),  # one letter of five too many
        (ocr_prompt("HELLO AB", "red", "brick"), 0.775),  # 0.6 x 5/8 + 0.4
        (ocr_prompt("QQQQQ", "green", "starry"), 0.0),
        ("a photo of a red circle on a brick background", 0.2),
        ("a photo of a red circle on a sandy background", 0.0),
    ],
)
def test_the_fit_of_a_sign(prompt: str, fit: float) -> None:
    assert fit_of(prompt, sign()) == pytest.approx(fit)


@pytest.mark.parametrize(
    ("phrase", "fit"),
    [
        ("a red circle and a blue star", 1.0),
        ("a circle and a star", 1.0),
        ("a green circle and a blue star", 0.8),  # parts 1, 0, 1, 1: 0.8 x 3/4 + 0.2
        ("two circles", 0.6),  # one of two: 0.8 x 1/2 + 0.2
        ("a ring", 0.2),
        ("a star right of a circle", 1.0),
        ("a star left of a circle", 0.8 * 2 / 3 + 0.2),  # both are present, their position is wrong
    ],
)
def test_the_fit_of_shapes(phrase: str, fit: float) -> None:
    content = shapes(CIRCLE, STAR)
    assert fit_of(f"a photo of {phrase} on a sandy background", content) == pytest.approx(fit)
    assert fit_of(f"a photo of {phrase} on a starry background", content) == pytest.approx(fit - 0.2)


def test_shapes_hardly_fit_the_prompt_of_a_sign() -> None:
    assert fit_of(ocr_prompt("HELLO", "red", "sandy"), shapes(CIRCLE)) == pytest.approx(0.2)
    assert fit_of(ocr_prompt("HELLO", "red", "brick"), shapes(CIRCLE)) == 0.0


@pytest.mark.parametrize("tag", sorted(set(TAGS)))
def test_the_metadata_of_a_prompt_is_that_of_its_scene(tag: str) -> None:
    rng = np.random.default_rng(7)
    for _ in range(300):
        scene = plan_scene(rng, tag)
        assert metadata_of(scene.prompt)["include"] == scene.metadata["include"], scene.prompt


@pytest.mark.parametrize("tag", sorted(set(TAGS)))
def test_a_scene_fits_its_own_prompt(tag: str) -> None:
    rng = np.random.default_rng(8)
    for _ in range(20):
        scene = plan_scene(rng, tag)
        assert scene_fit(scene.prompt, scene.things) == 1.0, scene


def test_drawings_fit_their_own_prompts() -> None:
    """Except for crowds, which have the prompt of another scene, and signs that another sign partly covers."""
    rng = np.random.default_rng(9)
    for _ in range(60):
        content = draw_sign_content(rng)
        if content.text == content.drawing.text:
            assert fit_of(content.drawing.prompt, content) == pytest.approx(1.0)
        else:
            assert fit_of(content.drawing.prompt, content) < 1.0
        content = draw_shapes_content(rng)
        if content.drawing.metadata is not None:
            assert fit_of(content.drawing.prompt, content) == pytest.approx(1.0)


def test_the_text_of_signs_has_the_visible_letters() -> None:
    rng = np.random.default_rng(10)
    covered = 0
    for _ in range(120):
        content = draw_sign_content(rng)
        covered += content.text != content.drawing.text
        assert Counter(content.text.replace(" ", "")) == Counter(content.drawing.letters.values())
        assert content.sign_colour == content.drawing.prompt.split()[1]
    assert 18 <= covered <= 54  # 30 % of 120 are 36, standard deviation 5


def test_an_example_is_a_function_of_its_random_numbers() -> None:
    for kind in (None, "signs", "shapes"):
        one, again, other = (draw_example(np.random.default_rng(seed), kind=kind) for seed in (3, 3, 4))
        assert np.array_equal(one.pixels, again.pixels)
        assert (one.prompt, one.qualities) == (again.prompt, again.qualities)
        assert np.array_equal(one.letters, again.letters) and np.array_equal(one.things, again.things)
        assert not np.array_equal(one.pixels, other.pixels)


@pytest.mark.slow
def test_examples_have_pixels_qualities_and_known_words() -> None:
    """Half have a fault of coherence, 0.35 one of style; 150 draws: 75 +- 6.1 and 52.5 +- 5.8."""
    rng, vocabulary = np.random.default_rng(11), judge_vocabulary()
    examples = [draw_example(rng) for _ in range(150)]
    for example in examples:
        assert (example.pixels.dtype, example.pixels.shape) == (np.uint8, (64, 64, 3))
        assert all(0 <= quality <= 1 for quality in example.qualities)
        numbers = word_numbers(example.prompt, vocabulary)
        assert UNKNOWN not in numbers
        assert numbers[-1] == 0  # no prompt of the world is too long
    alignment, coherence, style = np.array([example.qualities for example in examples]).T
    assert 50 <= (coherence < 1).sum() <= 100 and 29 <= (style < 1).sum() <= 76
    ruined = coherence < 0.1  # the fit is reduced to 1 - (1 - coherence)^2 < 0.19 of its value
    assert ruined.any() and (alignment[ruined] < 0.19).all()
    assert len(set(alignment.round(3))) > 20


def test_clean_examples_have_no_fault() -> None:
    rng = np.random.default_rng(12)
    kinds = set()
    for _ in range(30):
        example = draw_example(rng, clean=True)
        assert example.qualities[1:] == (1.0, 1.0)
        kinds.add((bool((example.letters >= 0).any()), bool((example.things >= 0).any())))
    assert kinds == {(True, False), (False, True)}


def test_a_letter_covers_two_cells() -> None:
    """Token row 1 is rows 2 and 3 of cells; letter column 2 is column 2: cells 2 x 8 + 2 and 3 x 8 + 2."""
    drawing = draw_sign("HI", colour="red", background="plain", rng=np.random.default_rng(0), place=(1, 2))
    cells = letter_cells(drawing)
    assert cells.shape == (64,) and cells.dtype == np.int64
    assert {int(i): ALPHABET[cells[i]] for i in np.nonzero(cells >= 0)[0]} == {18: "H", 26: "H", 19: "I", 27: "I"}
    assert (thing_cells(drawing) == -1).all()


def test_a_thing_covers_four_cells() -> None:
    """Token (1, 3) is rows 2 and 3, columns 6 and 7 of cells; shape and colour are shape x 8 + colour."""
    thing = Thing("star", "yellow", 1, 3)
    drawing = shapes(thing).drawing
    cells = thing_cells(drawing)
    assert np.nonzero(cells >= 0)[0].tolist() == [22, 23, 30, 31]
    assert set(cells[[22, 23, 30, 31]].tolist()) == {SHAPES.index("star") * 8 + list(COLOURS).index("yellow")}
    assert (letter_cells(drawing) == -1).all()


def test_the_vocabulary_numbers_each_word_once() -> None:
    vocabulary = judge_vocabulary()
    assert sorted(vocabulary.values()) == list(range(SPACE + 1, SPACE + 1 + len(vocabulary)))
    assert {"background", "circles", "below", "A", "Z", "a", "starry", "four"} <= vocabulary.keys()
    longest = ocr_prompt("ABCDEF GHIJKL", "purple", "wooden")
    assert len([number for number in word_numbers(longest, vocabulary) if number]) == 22 <= TEXT_LENGTH


def test_the_two_axes_have_different_faults() -> None:
    assert not COHERENCE.keys() & STYLE.keys()


def test_a_repeated_sign_is_read_twice_and_fits_worse() -> None:
    drawing = draw_sign("HELLO", colour="red", background="brick", rng=np.random.default_rng(0), place=(1, 1))
    rng = np.random.default_rng(1)
    twins = [repeated_sign(drawing, rng) for _ in range(40)]
    assert all(twin.text == "HELLO" and twin.prompt == drawing.prompt for twin in twins)
    assert {min(twin.letters) for twin in twins} > {(0, 1), (2, 1)}  # directly above and below, and elsewhere
    text = " ".join(lines_of(drawing.letters | twins[0].letters))
    assert fit_of(drawing.prompt, Content(drawing, "HELLO", "red")) == 1.0
    assert fit_of(drawing.prompt, Content(drawing, "HELLO HELLO", "red")) == pytest.approx(0.4 + 0.6 * 5 / 11)
    assert text in ("HELLO HELLO", "HELLO")


def test_lines_are_read_from_top_to_bottom() -> None:
    letters = {(2, 3): "C", (0, 1): "A", (0, 2): "B", (2, 1): "D"}
    assert lines_of(letters) == ["AB", "DC"]
