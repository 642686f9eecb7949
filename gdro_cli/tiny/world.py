"""The embedded world: 64 x 64 images of signs and shapes with their prompts.

There are two kinds of images, one per reward: a sign with one or two lines of text (OCR), and shapes with GenEval
metadata. Everything is aligned with the grid of the model's tokens, so that a tiny model can learn it in an hour: a
letter is 8 pixels wide in one 16-pixel token row; a shape fills one 16-pixel token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gdro_cli.tiny.backgrounds import BACKGROUNDS, SIZE, draw_background

TOKEN = 16  # pixels per image token, and per shape
GRID = SIZE // TOKEN  # tokens per side
LETTER = 8  # pixels per letter
ZOOM = 4  # signs and shapes are drawn larger and reduced, for smooth edges
MAX_LETTERS = 6  # letters per line: 6 x 8 pixels and the margins of the sign fill the image
MAX_LINES = 2

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (247, 127, 0),
    "yellow": (252, 211, 25),
    "green": (34, 150, 70),
    "blue": (38, 84, 200),
    "purple": (126, 48, 168),
    "pink": (255, 130, 180),
    "brown": (112, 66, 30),
}
LIGHT_COLOURS = frozenset({"orange", "yellow", "pink"})  # these take dark letters
INK, CHALK = (20, 20, 24), (250, 250, 248)
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Short words are frequent: letters bind to the prompt only if the model sees short words first.
WORD_LENGTHS = (1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6)
TWO_LINE_SHARE = 0.35
# Single objects and colours are twice as frequent: they teach the names that the other tags combine.
TAGS = ("single_object", "single_object", "colors", "colors", "two_object", "counting", "position", "color_attr")


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape in one token of the image: its names, and the token's row and column."""

    shape: str
    colour: str
    row: int
    column: int


@dataclass(frozen=True, slots=True)
class Drawing:
    """A drawn image, and everything that is known about it.

    ``letters`` maps (token row, letter column) to the letter at that position; letter columns are 8 pixels wide.
    """

    image: Image.Image
    prompt: str
    background: str
    text: str | None = None
    letters: dict[tuple[int, int], str] = field(default_factory=dict)
    things: tuple[Thing, ...] = ()
    metadata: dict[str, Any] | None = None


@lru_cache(maxsize=1)
def sign_font() -> ImageFont.FreeTypeFont:
    """DejaVu Sans Mono Bold from matplotlib's wheel, at the drawing zoom."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono-Bold.ttf"
    return ImageFont.truetype(str(path), 14 * ZOOM)


def ocr_prompt(text: str, colour: str, background: str) -> str:
    """The prompt of a sign."""
    return f'a {colour} sign that says "{text}" on a {background} background'


def draw_sign(
    text: str, *, colour: str, background: str, rng: np.random.Generator, place: tuple[int, int] | None = None
) -> Drawing:
    """Draw a sign with one line of text, or two separated by one space.

    Args:
        text: upper-case letters, at most 6 a line.
        colour: one of ``COLOURS``.
        background: one of ``BACKGROUNDS``.
        rng: source of the texture, and of the place if it is None.
        place: token row and letter column of the first letter.

    Raises:
        ValueError: the text does not fit the world.
    """
    lines = text.split(" ")
    if not 1 <= len(lines) <= MAX_LINES or any(
        not 1 <= len(line) <= MAX_LETTERS or not set(line) <= set(ALPHABET) for line in lines
    ):
        raise ValueError(f"the world's signs take one or two words of 1 to {MAX_LETTERS} letters A-Z, not {text!r}")
    width = max(len(line) for line in lines)
    if place is None:
        row = int(rng.integers(0, GRID - len(lines) + 1))
        place = row, int(rng.integers(1, SIZE // LETTER - width))
    row, column = place
    left, top = column * LETTER - 4, row * TOKEN - 5
    box = [left, top, left + width * LETTER + 7, top + 21 + TOKEN * (len(lines) - 1)]
    layer = Image.new("RGBA", (SIZE * ZOOM, SIZE * ZOOM))
    pen = ImageDraw.Draw(layer)
    ink = INK if colour in LIGHT_COLOURS else CHALK
    pen.rounded_rectangle(
        [box[0] * ZOOM, box[1] * ZOOM, (box[2] + 1) * ZOOM - 1, (box[3] + 1) * ZOOM - 1],
        radius=4 * ZOOM,
        fill=COLOURS[colour],
        outline=ink,
        width=ZOOM,
    )
    letters = {}
    for number, line in enumerate(lines):
        middle = (row + number) * TOKEN + 6
        for index, letter in enumerate(line):
            centre = ((column + index) * LETTER + LETTER / 2) * ZOOM
            pen.text((centre, middle * ZOOM), letter, font=sign_font(), fill=ink, anchor="mm")
            letters[row + number, column + index] = letter
    image = _compose(draw_background(background, rng), layer)
    return Drawing(image, ocr_prompt(text, colour, background), background, text=text, letters=letters)


def draw_things(things: Sequence[Thing], *, background: str, rng: np.random.Generator) -> Image.Image:
    """Draw shapes, each in its token, on a background."""
    pixels = draw_background(background, rng)
    outline = CHALK if pixels.mean() < 120 else INK
    layer = Image.new("RGBA", (SIZE * ZOOM, SIZE * ZOOM))
    pen = ImageDraw.Draw(layer)
    for thing in things:
        _draw_thing(pen, thing, outline)
    return _compose(pixels, layer)


def thing_mask(thing: Thing) -> NDArray[np.bool_]:
    """Pixels [64, 64] that a shape with its outline covers by at least half."""
    layer = Image.new("RGBA", (SIZE * ZOOM, SIZE * ZOOM))
    _draw_thing(ImageDraw.Draw(layer), thing, INK)
    alpha = np.asarray(layer.getchannel("A").resize((SIZE, SIZE), Image.Resampling.BOX))
    return np.asarray(alpha >= 128)


def foreground_mask(drawing: Drawing) -> NDArray[np.bool_]:
    """Pixels [64, 64] of the sign's box and of the shapes."""
    mask = np.zeros((SIZE, SIZE), bool)
    for thing in drawing.things:
        mask |= thing_mask(thing)
    if drawing.letters:
        rows, columns = zip(*drawing.letters, strict=True)
        top, bottom = min(rows) * TOKEN - 5, max(rows) * TOKEN + 17
        mask[max(top, 0) : bottom, max(min(columns) * LETTER - 4, 0) : max(columns) * LETTER + LETTER + 4] = True
    return mask


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, outline: tuple[int, int, int]) -> None:
    centre = ((thing.column + 0.5) * TOKEN * ZOOM, (thing.row + 0.5) * TOKEN * ZOOM)
    _draw_shape(pen, thing.shape, centre, COLOURS[thing.colour], outline)


def _compose(pixels: NDArray[np.uint8], layer: Image.Image) -> Image.Image:
    overlay = np.asarray(layer.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)
    alpha = overlay[..., 3:] / 255  # RGBa colours are multiplied by alpha, so that edges shrink without halos
    return Image.fromarray(np.clip(overlay[..., :3] + pixels * (1 - alpha) + 0.5, 0, 255).astype(np.uint8))


def _outline_points(shape: str, centre: tuple[float, float], radius: float) -> list[tuple[float, float]]:
    """Corner points of a polygonal shape, y downwards."""
    x, y = centre
    if shape == "square":
        side = radius * 0.9
        return [(x - side, y - side), (x + side, y - side), (x + side, y + side), (x - side, y + side)]
    if shape == "triangle":
        return [(x, y - radius), (x + radius, y + radius * 0.85), (x - radius, y + radius * 0.85)]
    if shape == "star":
        points = []
        for step in range(10):
            angle, reach = math.pi * step / 5, radius * (1.08 if step % 2 == 0 else 0.46)
            points.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
        return points
    points = []  # heart: the usual parametric curve, scaled to the radius
    for step in range(48):
        a = 2 * math.pi * step / 48
        wide = 16 * math.sin(a) ** 3
        high = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        points.append((x + radius * wide / 16, y - radius * (high + 2.5) / 15))
    return points


def _draw_shape(
    pen: ImageDraw.ImageDraw,
    shape: str,
    centre: tuple[float, float],
    fill: tuple[int, int, int],
    outline: tuple[int, int, int],
) -> None:
    x, y = centre
    radius, line = 7 * ZOOM, ZOOM
    if shape == "circle":
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill, outline=outline, width=line)
    elif shape == "ring":
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill, outline=outline, width=line)
        hole = radius * 0.45
        pen.ellipse([x - hole, y - hole, x + hole, y + hole], fill=CHALK, outline=outline, width=line)
    else:
        points = _outline_points(shape, centre, radius)
        pen.polygon(points, fill=fill)
        pen.line([*points, points[0], points[1]], fill=outline, width=line, joint="curve")


def random_word(rng: np.random.Generator) -> str:
    """A random string of letters, so that the model can learn any word."""
    length = WORD_LENGTHS[rng.integers(len(WORD_LENGTHS))]
    return "".join(ALPHABET[i] for i in rng.integers(0, 26, length))


def _pick(rng: np.random.Generator, names: Sequence[str], count: int = 1) -> list[str]:
    return [names[i] for i in rng.choice(len(names), count, replace=False)]


def random_sign(rng: np.random.Generator) -> Drawing:
    """A sign with random text, colour, background and place."""
    words = [random_word(rng) for _ in range(2 if rng.random() < TWO_LINE_SHARE else 1)]
    (colour,), (background,) = _pick(rng, list(COLOURS)), _pick(rng, list(BACKGROUNDS))
    return draw_sign(" ".join(words), colour=colour, background=background, rng=rng)


def random_scene(rng: np.random.Generator, tag: str | None = None) -> Drawing:
    """Shapes as in a GenEval prompt of ``tag`` (None: any tag), with its metadata."""
    scene = plan_scene(rng, tag)
    image = draw_things(scene.things, background=scene.background, rng=rng)
    return Drawing(image, scene.prompt, scene.background, things=scene.things, metadata=scene.metadata)


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of a drawing of shapes."""

    prompt: str
    background: str
    things: tuple[Thing, ...]
    metadata: dict[str, Any]


def plan_scene(rng: np.random.Generator, tag: str | None = None) -> Scene:
    """A random scene that is not drawn yet."""
    tag = tag or TAGS[rng.integers(len(TAGS))]
    (background,) = _pick(rng, list(BACKGROUNDS))
    tail = f" on a {background} background"
    shapes, colours = _pick(rng, SHAPES, 2), _pick(rng, list(COLOURS), 2)
    cells = [divmod(int(i), GRID) for i in rng.permutation(GRID * GRID)]
    first, second = cells[0], cells[1]
    include: list[dict[str, Any]] = [{"class": shapes[0], "count": 1}]
    exclude: list[dict[str, Any]] | None = None
    if tag == "single_object":
        phrase, placed = f"a {shapes[0]}", [(shapes[0], colours[0], first)]
    elif tag == "colors":
        phrase, placed = f"a {colours[0]} {shapes[0]}", [(shapes[0], colours[0], first)]
        include[0]["color"] = colours[0]
    elif tag == "counting":
        count = int(rng.integers(2, 5))
        phrase = f"{NUMBERS[count]} {shapes[0]}s"
        placed = [(shapes[0], _pick(rng, list(COLOURS))[0], cell) for cell in cells[:count]]
        include[0]["count"] = count
        exclude = [{"class": shapes[0], "count": count + 1}]
    else:
        include.append({"class": shapes[1], "count": 1})
        phrase = f"a {shapes[0]} and a {shapes[1]}"
        if tag == "color_attr":
            phrase = f"a {colours[0]} {shapes[0]} and a {colours[1]} {shapes[1]}"
            include[0]["color"], include[1]["color"] = colours
        elif tag == "position":
            # official metadata of "a heart left of a ring": the ring comes first, the heart refers to it
            (relation,) = _pick(rng, list(RELATIONS))
            first, second = _related_cells(relation, rng)
            phrase = f"a {shapes[0]} {relation} a {shapes[1]}"
            include = [
                {"class": shapes[1], "count": 1},
                {"class": shapes[0], "count": 1, "position": [relation, 0]},
            ]
        elif rng.random() < 0.5:
            colours[1] = _pick(rng, list(COLOURS))[0]  # colours that the prompt does not name may be equal
        placed = [(shapes[0], colours[0], first), (shapes[1], colours[1], second)]
    things = tuple(Thing(shape, colour, row, column) for shape, colour, (row, column) in placed)
    prompt = f"a photo of {phrase}{tail}"
    metadata: dict[str, Any] = {"tag": tag, "include": include, "prompt": prompt}
    if exclude:
        metadata["exclude"] = exclude
    return Scene(prompt, background, things, metadata)


def _related_cells(relation: str, rng: np.random.Generator) -> tuple[tuple[int, int], tuple[int, int]]:
    """Cells of A and B with A ``relation`` B: at least two cells apart on the axis, at most one on the other."""
    down, right = RELATIONS[relation]
    pairs = [
        ((r1, c1), (r2, c2))
        for r1 in range(GRID)
        for c1 in range(GRID)
        for r2 in range(GRID)
        for c2 in range(GRID)
        if (down and (r1 - r2) * down >= 2 and abs(c1 - c2) <= 1)
        or (right and (c1 - c2) * right >= 2 and abs(r1 - r2) <= 1)
    ]
    return pairs[rng.integers(len(pairs))]
