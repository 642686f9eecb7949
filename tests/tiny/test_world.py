"""The embedded world: images match their prompts and labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from gdro_cli.tiny.backgrounds import BACKGROUNDS, draw_background
from gdro_cli.tiny.pretraining_set import letter_places, pack_latents, token_labels
from gdro_cli.tiny.world import (
    ALPHABET,
    COLOURS,
    GRID,
    RELATIONS,
    SHAPES,
    TAGS,
    TOKEN,
    Thing,
    draw_sign,
    draw_things,
    random_scene,
    random_sign,
)


def test_sign_has_its_colour_background_and_prompt() -> None:
    """The sign HI at token row 1, letter column 2 covers x 12..35, y 11..32; its fill is blue just inside the edge."""
    drawing = draw_sign("HI", colour="blue", background="plain", rng=np.random.default_rng(0), place=(1, 2))
    pixels = np.asarray(drawing.image).astype(int)
    assert drawing.image.size == (64, 64)
    assert drawing.prompt == 'a blue sign that says "HI" on a plain background'
    assert np.abs(pixels[14, 20] - COLOURS["blue"]).max() <= 2
    assert np.abs(pixels[40, 20] - COLOURS["blue"]).max() > 40
    assert drawing.letters == {(1, 2): "H", (1, 3): "I"}


def test_two_words_are_on_two_lines() -> None:
    drawing = draw_sign("AB CDE", colour="red", background="sandy", rng=np.random.default_rng(0), place=(1, 1))
    assert drawing.letters == {(1, 1): "A", (1, 2): "B", (2, 1): "C", (2, 2): "D", (2, 3): "E"}


@pytest.mark.parametrize("text", ["", "lower", "TOOLONGWORD", "A B C", "A  B", "É"])
def test_text_that_does_not_fit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="the world's signs take"):
        draw_sign(text, colour="red", background="sandy", rng=np.random.default_rng(0))


@pytest.mark.slow
def test_random_signs_are_inside_the_image() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        drawing = random_sign(rng)
        assert drawing.text is not None
        assert "".join(drawing.letters.values()) == drawing.text.replace(" ", "")
        assert all(0 <= row <= 3 and 1 <= column <= 6 for row, column in drawing.letters)


def test_letter_labels_name_token_and_half() -> None:
    """Letter column 3 is the right half of token column 1; row 2 -> token 2 * 4 + 1 = 9."""
    drawing = draw_sign("Q", colour="pink", background="brick", rng=np.random.default_rng(0), place=(2, 3))
    letters = token_labels(drawing).letters
    assert letters[9].tolist() == [-1, ALPHABET.index("Q")]
    assert (letters >= 0).sum() == 1


@pytest.mark.parametrize("tag", sorted(set(TAGS)))
def test_a_scene_matches_its_metadata(tag: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        drawing = random_scene(rng, tag)
        metadata = drawing.metadata
        assert metadata is not None
        assert metadata["tag"] == tag
        assert metadata["prompt"] == drawing.prompt
        assert len({(thing.row, thing.column) for thing in drawing.things}) == len(drawing.things)
        for clause in metadata["include"]:
            matching = [thing for thing in drawing.things if thing.shape == clause["class"]]
            assert len(matching) == clause["count"]
            assert all(thing.colour == clause.get("color", thing.colour) for thing in matching)
            if "position" in clause:
                relation, index = clause["position"]
                (other,) = [t for t in drawing.things if t.shape == metadata["include"][index]["class"]]
                down, right = RELATIONS[relation]
                apart = (matching[0].row - other.row) * down + (matching[0].column - other.column) * right
                assert apart >= 2


def test_shape_is_drawn_in_its_token_in_its_colour() -> None:
    """The centre of a shape in cell (3, 1) is pixel (56, 24)."""
    for shape in SHAPES:
        image = draw_things([Thing(shape, "green", 3, 1)], background="plain", rng=np.random.default_rng(3))
        empty = draw_things([], background="plain", rng=np.random.default_rng(3))
        changed = np.abs(np.asarray(image).astype(int) - np.asarray(empty)).max(axis=-1) > 6
        rows, columns = np.nonzero(changed)
        assert rows.min() >= 3 * TOKEN and rows.max() < 4 * TOKEN
        assert columns.min() >= TOKEN and columns.max() < 2 * TOKEN
        distance = np.abs(np.asarray(image).astype(int) - COLOURS["green"]).max(axis=-1)
        assert (distance[48:64, 16:32] <= 2).sum() > 20


def test_backgrounds_have_fresh_textures() -> None:
    for name in BACKGROUNDS:
        first, second = (draw_background(name, np.random.default_rng(seed)) for seed in (0, 1))
        assert first.shape == (64, 64, 3)
        assert (first != second).mean() > 0.2


def test_the_second_line_has_letter_places_from_6_on() -> None:
    """Tokens 10 and 11 are letters, 5 breaks the line."""
    places = letter_places([1, 10, 11, 5, 10, 2], frozenset({10, 11}), 5)
    assert places.tolist() == [-1, 0, 1, -1, 6, -1]


def test_packing_is_that_of_the_pipeline() -> None:
    latents = torch.randn(2, 32, 2 * GRID, 2 * GRID)
    expected = FluxPipeline._pack_latents(latents, 2, 32, 2 * GRID, 2 * GRID)
    assert torch.equal(pack_latents(latents), expected)
