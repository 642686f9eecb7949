"""Votes of pixels for palette colours, counted by hand."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gdro_cli.embedded import tiny_detector_path
from gdro_cli.errors import PrerequisiteError
from gdro_cli.rewards.geneval.detection import Detection
from gdro_cli.rewards.geneval.palette import PaletteColours, Rgb
from gdro_cli.tiny.world import CHALK, COLOURS, INK, SHAPES, Thing, draw_things, thing_mask

RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)
PALETTE: dict[str, Rgb] = {"red": RED, "green": GREEN, "blue": BLUE}


def found(*pixels: Rgb, masked: str | None = None) -> tuple[Image.Image, Detection]:
    """A picture of one row and an object in it: the pixels with an x in ``masked``, all without."""
    picture = Image.new("RGB", (len(pixels), 1))
    picture.putdata(list(pixels))
    mask = np.array([[letter == "x" for letter in masked or "x" * len(pixels)]])
    return picture, Detection("circle", 1.0, (0, 0, len(pixels), 1), mask)


def colour(colours: PaletteColours, picture: Image.Image, *objects: Detection) -> list[str]:
    return colours.classify(picture, objects)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        ((RED, RED, BLUE), "red"),
        ((RED, BLUE, BLUE), "blue"),
        # Nearest: (200, 90, 60) is 55^2 + 90^2 + 60^2 = 14,725 from red, 200^2 + 165^2 + ... from green, farther still
        # from blue; two such votes beat one pure blue.
        (((200, 90, 60), (200, 60, 90), BLUE), "red"),
        # Each pixel has one vote, however near: the mean colour (113, 0, 142) is nearer to blue than to red.
        (((130, 0, 125), (130, 0, 125), (80, 0, 176), (130, 0, 125), (95, 0, 160)), "red"),
        ((BLUE, RED), "red"),  # a tie goes to the colour that the palette names first
    ],
)
def test_the_colour_with_most_votes_wins(pixels: tuple[Rgb, ...], expected: str) -> None:
    assert colour(PaletteColours(PALETTE), *found(*pixels)) == [expected]


def test_only_pixels_of_the_mask_vote() -> None:
    picture, first = found(RED, RED, RED, BLUE, GREEN, masked="x..x.")
    _, second = found(RED, RED, RED, BLUE, GREEN, masked="...xx")
    _, third = found(RED, RED, RED, BLUE, GREEN, masked="...x.")
    assert colour(PaletteColours(PALETTE), picture, first, second, third) == ["red", "green", "blue"]
    assert colour(PaletteColours(PALETTE), picture) == []


def test_neutral_pixels_take_their_votes_away_and_never_win() -> None:
    """Three of five dark pixels: (70, 0, 90) is 8,100 + 4,900 from black and 185^2 + ... from red or blue.

    Without black as neutral they are blue (165^2 + 70^2 = 32,125 against 185^2 + 90^2 = 42,325) and outvote two reds.
    """
    picture, item = found((70, 0, 90), (70, 0, 90), (70, 0, 90), RED, RED)
    assert colour(PaletteColours(PALETTE), picture, item) == ["blue"]
    assert colour(PaletteColours(PALETTE, neutral=[BLACK]), picture, item) == ["red"]


def test_nothing_but_neutral_pixels_gets_the_nearest_colour_all_the_same() -> None:
    picture, item = found((0, 0, 40), (0, 30, 0), (0, 0, 30))
    assert colour(PaletteColours(PALETTE, neutral=[BLACK]), picture, item) == ["blue"]


@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_shapes_have_their_colour_inside_the_true_mask(shape: str) -> None:
    """On a dark and on a bright background; the hole of a ring is chalk, which is neutral."""
    colours = PaletteColours.read(tiny_detector_path() / "palette.json")
    for background in ("starry", "plain"):
        things = [Thing(shape, name, *divmod(place, 4)) for place, name in enumerate(COLOURS)]
        picture = draw_things(things, background=background, rng=np.random.default_rng(1))
        objects = [Detection(shape, 1.0, (0, 0, 64, 64), thing_mask(thing)) for thing in things]
        assert colours.classify(picture, objects) == list(COLOURS)


def test_the_shipped_palette_is_the_world_s() -> None:
    version = PaletteColours.read(tiny_detector_path() / "palette.json").version
    assert version["palette"] == {name: list(rgb) for name, rgb in COLOURS.items()}
    assert version["neutral"] == [list(INK), list(CHALK)]
    json.dumps(version, allow_nan=False)
    assert version != PaletteColours(COLOURS).version


@pytest.mark.parametrize("palette", [{}, {"crimson": RED}, {"red": RED, "grey": BLACK}])
def test_names_that_geneval_does_not_have_are_refused(palette: dict[str, Rgb]) -> None:
    with pytest.raises(ValueError, match="names of GenEval's colours"):
        PaletteColours(palette)


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        '{"palette": {"red": [1, 2, 3]}}',
        '{"palette": {"red": [1, 2]}, "neutral": []}',
        '{"palette": {"crimson": [1, 2, 3]}, "neutral": []}',
        '{"palette": [], "neutral": []}',
    ],
)
def test_a_missing_or_damaged_file_is_one_sentence(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "palette.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PrerequisiteError, match="is missing or damaged: reinstall") as caught:
        PaletteColours.read(path)
    assert str(path) in str(caught.value)


def test_a_pickled_classifier_names_the_same() -> None:
    colours = PaletteColours(PALETTE, neutral=[BLACK])
    colours.load()
    copy: PaletteColours = pickle.loads(pickle.dumps(colours))
    picture, item = found((70, 0, 90), RED)
    assert copy.classify(picture, [item]) == colours.classify(picture, [item]) == ["red"]
    assert copy.version == colours.version
