"""The pixels' votes for palette colours, counted by hand."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from gdro_cli.embedded import tiny_detector_path
from gdro_cli.rewards.geneval.detection import Detection
from gdro_cli.rewards.geneval.palette import PaletteColours, Rgb
from gdro_cli.tiny.world import CHALK, COLOURS, INK, SHAPES, Thing, draw_things, thing_mask

RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)
PALETTE: dict[str, Rgb] = {"red": RED, "green": GREEN, "blue": BLUE}


def row(*pixels: Rgb, masked: str | None = None) -> tuple[Image.Image, Detection]:
    """An image of one row and an object in it: the pixels with an x in ``masked``, by default all of them."""
    image = Image.new("RGB", (len(pixels), 1))
    image.putdata(list(pixels))
    mask = np.array([[letter == "x" for letter in masked or "x" * len(pixels)]])
    return image, Detection("circle", 1.0, (0, 0, len(pixels), 1), mask)


def colour(colours: PaletteColours, image: Image.Image, *objects: Detection) -> list[str]:
    return colours.classify(image, objects)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [
        ((RED, RED, BLUE), "red"),
        ((RED, BLUE, BLUE), "blue"),
        # (200, 90, 60) is 55^2 + 90^2 + 60^2 = 14,725 from red, 200^2 + 165^2 + ... from green, and farther from blue;
        # two such votes beat one pure blue.
        (((200, 90, 60), (200, 60, 90), BLUE), "red"),
        # Each pixel has one vote, whatever its distance: the mean colour (113, 0, 142) is nearer to blue than to red.
        (((130, 0, 125), (130, 0, 125), (80, 0, 176), (130, 0, 125), (95, 0, 160)), "red"),
        ((BLUE, RED), "red"),  # a tie goes to the colour that the palette names first
    ],
)
def test_the_colour_with_most_votes_wins(pixels: tuple[Rgb, ...], expected: str) -> None:
    assert colour(PaletteColours(PALETTE), *row(*pixels)) == [expected]


def test_only_pixels_of_the_mask_vote() -> None:
    image, first = row(RED, RED, RED, BLUE, GREEN, masked="x..x.")
    _, second = row(RED, RED, RED, BLUE, GREEN, masked="...xx")
    _, third = row(RED, RED, RED, BLUE, GREEN, masked="...x.")
    assert colour(PaletteColours(PALETTE), image, first, second, third) == ["red", "green", "blue"]
    assert colour(PaletteColours(PALETTE), image) == []


def test_votes_for_neutral_colours_do_not_count() -> None:
    """Three of five pixels are dark: (70, 0, 90) is 8,100 + 4,900 from black and 185^2 + ... from red or blue.

    Without black as neutral they are blue (165^2 + 70^2 = 32,125 against 185^2 + 90^2 = 42,325) and outvote two reds.
    """
    image, item = row((70, 0, 90), (70, 0, 90), (70, 0, 90), RED, RED)
    assert colour(PaletteColours(PALETTE), image, item) == ["blue"]
    assert colour(PaletteColours(PALETTE, neutral=[BLACK]), image, item) == ["red"]


def test_if_all_pixels_are_neutral_the_nearest_colour_wins() -> None:
    image, item = row((0, 0, 40), (0, 30, 0), (0, 0, 30))
    assert colour(PaletteColours(PALETTE, neutral=[BLACK]), image, item) == ["blue"]


@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_shapes_have_their_colour_inside_the_true_mask(shape: str) -> None:
    """On a dark and on a bright background; the hole of a ring is chalk, which is neutral."""
    colours = PaletteColours.read(tiny_detector_path() / "palette.json")
    for background in ("starry", "plain"):
        things = [Thing(shape, name, *divmod(cell, 4)) for cell, name in enumerate(COLOURS)]
        image = draw_things(things, background=background, rng=np.random.default_rng(1))
        objects = [Detection(shape, 1.0, (0, 0, 64, 64), thing_mask(thing)) for thing in things]
        assert colours.classify(image, objects) == list(COLOURS)


def test_the_shipped_palette_is_the_worlds() -> None:
    version = PaletteColours.read(tiny_detector_path() / "palette.json").version
    assert version["palette"] == {name: list(rgb) for name, rgb in COLOURS.items()}
    assert version["neutral"] == [list(INK), list(CHALK)]
    json.dumps(version, allow_nan=False)
    assert version != PaletteColours(COLOURS).version


@pytest.mark.parametrize("palette", [{}, {"crimson": RED}, {"red": RED, "grey": BLACK}])
def test_names_that_geneval_does_not_have_are_refused(palette: dict[str, Rgb]) -> None:
    with pytest.raises(ValueError, match="names of GenEval's colours"):
        PaletteColours(palette)


def test_a_pickled_classifier_gives_the_same_colours() -> None:
    colours = PaletteColours(PALETTE, neutral=[BLACK])
    copy: PaletteColours = pickle.loads(pickle.dumps(colours))
    image, item = row((70, 0, 90), RED)
    assert copy.classify(image, [item]) == colours.classify(image, [item]) == ["red"]
    assert copy.version == colours.version
