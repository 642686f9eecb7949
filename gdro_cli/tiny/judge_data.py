"""The embedded judge's training data: images with a prompt, known faults and a known fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rapidfuzz.distance import Levenshtein

from gdro_cli.core.geneval import parse_task
from gdro_cli.rewards.geneval.detection import Detection, mask_box
from gdro_cli.rewards.geneval.rules import judge, wants_colours
from gdro_cli.rewards.judge.embedded import CELLS, SPACE
from gdro_cli.tiny.backgrounds import BACKGROUNDS
from gdro_cli.tiny.degrade import COHERENCE, STYLE, UNTEXTURED, degrade
from gdro_cli.tiny.pretraining_set import NO_LABEL
from gdro_cli.tiny.world import (
    ALPHABET,
    COLOURS,
    GRID,
    LETTER,
    NUMBERS,
    RELATIONS,
    SHAPES,
    Drawing,
    Thing,
    draw_sign,
    draw_things,
    foreground_mask,
    ocr_prompt,
    plan_scene,
    random_scene,
    random_sign,
    random_word,
    thing_mask,
)

SECOND_SIGN_SHARE = 0.3
REPEATED_SHARE = 0.6  # of the second signs: the same text again, which the OCR reward does not punish
CROWD_SHARE = 0.4
TEXT_WEIGHT, COLOUR_WEIGHT, BACKGROUND_WEIGHT = 0.6, 0.2, 0.2
CELLS_PER_TOKEN = CELLS // GRID


@dataclass(frozen=True, slots=True)
class Example:
    """An image, a prompt, and the qualities that the judge should give them."""

    pixels: NDArray[np.uint8]
    prompt: str
    qualities: tuple[float, float, float]
    """Alignment, coherence, style; each in [0, 1]."""
    letters: NDArray[np.int64]
    """[64] letter in each cell of 8 x 8 pixels; -1 for no letter."""
    things: NDArray[np.int64]
    """[64] shape and colour in each cell, as one number; -1 for no shape."""


@dataclass(frozen=True, slots=True)
class Content:
    """A drawing, and the text and colour of its sign."""

    drawing: Drawing
    text: str
    """All letters on its signs, a space between lines and signs; empty without a sign."""
    sign_colour: str | None


def judge_vocabulary() -> dict[str, int]:
    """The number of each word of the world's prompts and each letter; 0 to 2 are padding, unknown and space."""
    words = {"a", "an", "and", "of", "on", "photo", "sign", "that", "says", "background"}
    words |= {*COLOURS, *BACKGROUNDS, *NUMBERS.values(), *SHAPES, *(f"{shape}s" for shape in SHAPES)}
    words |= {word for relation in RELATIONS for word in relation.split()}
    return {word: SPACE + 1 + number for number, word in enumerate([*sorted(words), *ALPHABET])}


def draw_example(rng: np.random.Generator, *, kind: str | None = None, clean: bool = False) -> Example:
    """A random example; ``kind`` is ``signs`` or ``shapes`` (None: either), ``clean`` means without faults."""
    if kind is None:
        kind = "signs" if rng.random() < 0.5 else "shapes"
    content = draw_sign_content(rng) if kind == "signs" else draw_shapes_content(rng)
    prompt = choose_prompt(content, rng)
    fit = fit_of(prompt, content)
    pixels = np.asarray(content.drawing.image)
    mask = foreground_mask(content.drawing)
    coherence = style = 1.0
    for faults, share in ((COHERENCE, 0.5), (STYLE, 0.35)):
        if clean or rng.random() >= share:
            continue
        severity = float(rng.uniform(0, 1))
        name = list(faults)[rng.integers(len(faults))]
        if name == "flattened" and content.drawing.background in UNTEXTURED:
            continue
        pixels = degrade(pixels, name, severity, rng, foreground=mask)
        if faults is COHERENCE:
            coherence = 1 - severity
        else:
            style = 1 - severity
    lost = (1 - coherence) ** 2  # a ruined image cannot be recognised
    return Example(
        pixels,
        prompt,
        (fit * (1 - lost), coherence, style),
        letter_cells(content.drawing),
        thing_cells(content.drawing),
    )


def draw_sign_content(rng: np.random.Generator) -> Content:
    """A sign, sometimes partly covered by a second one with another or the same text."""
    drawing = random_sign(rng)
    text = drawing.text or ""
    if rng.random() < SECOND_SIGN_SHARE:
        other = repeated_sign(drawing, rng) if rng.random() < REPEATED_SHARE else random_sign(rng)
        mask = foreground_mask(other)
        pixels = np.asarray(drawing.image).copy()
        pixels[mask] = np.asarray(other.image)[mask]
        visible = {
            (row, column): letter
            for (row, column), letter in drawing.letters.items()
            if not mask[row * 16 + 6, column * LETTER + 4]
        }
        drawing = replace(drawing, image=Image.fromarray(pixels), letters=visible | other.letters)
        text = " ".join(lines_of(drawing.letters))
    return Content(drawing, text, drawing.prompt.split()[1])


def repeated_sign(drawing: Drawing, rng: np.random.Generator) -> Drawing:
    """The same sign in another place, mostly directly above or below."""
    text, colour = drawing.text or "", drawing.prompt.split()[1]
    row, column = min(drawing.letters)
    beside = int(row + rng.choice((-1, 1)))
    near = rng.random() < 0.7 and 0 <= beside <= GRID - len(text.split())
    place = (beside, column) if near else None
    return draw_sign(text, colour=colour, background=drawing.background, rng=rng, place=place)


def lines_of(letters: Mapping[tuple[int, int], str]) -> list[str]:
    """The text of each line, top to bottom; ``letters`` are by (row, column)."""
    rows = sorted({row for row, _ in letters})
    return ["".join(letters[cell] for cell in sorted(letters) if cell[0] == row) for row in rows]


def draw_shapes_content(rng: np.random.Generator) -> Content:
    """The shapes of a prompt, or a crowd of random ones."""
    if rng.random() >= CROWD_SHARE:
        return Content(random_scene(rng), "", None)
    scene = plan_scene(rng)
    cells = rng.permutation(GRID * GRID)[: rng.integers(1, 8)]
    colours = list(COLOURS)
    few = [str(name) for name in rng.choice(SHAPES, rng.integers(1, 4), replace=False)]
    things = tuple(
        Thing(few[rng.integers(len(few))], colours[rng.integers(len(colours))], *divmod(int(cell), GRID))
        for cell in cells
    )
    image = draw_things(things, background=scene.background, rng=rng)
    return Content(Drawing(image, scene.prompt, scene.background, things=things), "", None)


def choose_prompt(content: Content, rng: np.random.Generator) -> str:
    """The drawing's own prompt, the same with changes, or another drawing's."""
    draw = rng.random()
    if draw < 0.1:
        if rng.random() < 0.5:
            return plan_scene(rng).prompt
        return ocr_prompt(random_word(rng), list(COLOURS)[rng.integers(len(COLOURS))], content.drawing.background)
    if content.text:
        return content.drawing.prompt if draw < 0.4 else changed_sign_prompt(content.drawing, rng)
    if draw < 0.5:
        return content.drawing.prompt
    return near_scene_prompt(content.drawing, rng)


def changed_sign_prompt(drawing: Drawing, rng: np.random.Generator) -> str:
    """The prompt of a sign, with changes to its colour, background and letters."""
    text, colour, background = list(drawing.text or ""), drawing.prompt.split()[1], drawing.background
    if rng.random() < 0.3:
        colour = list(COLOURS)[rng.integers(len(COLOURS))]
    if rng.random() < 0.3:
        background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    for _ in range(rng.integers(0, 4)):
        index, letter = int(rng.integers(len(text))), ALPHABET[rng.integers(26)]
        action = rng.random()
        if action < 0.6:
            text[index] = letter
        elif action < 0.8 and len(text) > 1:
            del text[index]
        else:
            text.insert(index, letter)
    words = "".join(text).split()[:2]
    return ocr_prompt(" ".join(word[:6] for word in words) or "A", colour, background)


def near_scene_prompt(drawing: Drawing, rng: np.random.Generator) -> str:
    """Another scene's prompt that shares shapes with the drawing, often on the same background."""
    shapes = {thing.shape for thing in drawing.things}
    candidates = [plan_scene(rng).prompt for _ in range(6)]
    prompt = max(candidates, key=lambda text: sum(shape in text for shape in shapes))
    if rng.random() < 0.7:
        prompt = re.sub(r"on a \w+ background", f"on a {drawing.background} background", prompt)
    return prompt


def fit_of(prompt: str, content: Content) -> float:
    """The share of the prompt that the drawing shows, in [0, 1]."""
    background = float(f"on a {content.drawing.background} background" in prompt)
    quoted = re.search(r'"([^"]*)"', prompt)
    if quoted is not None:
        if not content.text:
            return BACKGROUND_WEIGHT * background
        similarity = Levenshtein.normalized_similarity(quoted.group(1), content.text)
        colour = float(prompt.split()[1] == content.sign_colour)
        return TEXT_WEIGHT * similarity + COLOUR_WEIGHT * colour + BACKGROUND_WEIGHT * background
    if not content.drawing.things:
        return BACKGROUND_WEIGHT * background
    return (1 - BACKGROUND_WEIGHT) * scene_fit(prompt, content.drawing.things) + BACKGROUND_WEIGHT * background


def scene_fit(prompt: str, things: tuple[Thing, ...]) -> float:
    """The soft reward of a scene prompt for the things: GenEval's rules on objects that are known."""
    task = parse_task(metadata_of(prompt))
    objects: dict[str, list[Detection]] = {}
    colours: dict[str, list[str]] = {}
    for thing in things:
        mask = thing_mask(thing)
        box = mask_box(mask)
        if box is not None:
            objects.setdefault(thing.shape, []).append(Detection(thing.shape, 1.0, box, mask))
            colours.setdefault(thing.shape, []).append(thing.colour)
    return judge(task, objects, {label: colours.get(label, []) for label in wants_colours(task)}).soft


def metadata_of(prompt: str) -> dict[str, Any]:
    """The GenEval metadata of a scene prompt of the world."""
    phrase = prompt.removeprefix("a photo of ").split(" on a ")[0]
    for relation in RELATIONS:
        if f" {relation} a " in phrase:
            first, second = phrase.removeprefix("a ").split(f" {relation} a ")
            include: list[dict[str, Any]] = [
                {"class": second, "count": 1},
                {"class": first, "count": 1, "position": [relation, 0]},
            ]
            return {"tag": "position", "include": include}
    numbers = {word: number for number, word in NUMBERS.items()}
    words = phrase.split()
    if words[0] in numbers:
        return {"tag": "counting", "include": [{"class": words[1].removesuffix("s"), "count": numbers[words[0]]}]}
    include = []
    for part in phrase.split(" and "):
        *colour, shape = part.removeprefix("a ").split()
        include.append({"class": shape, "count": 1} | ({"color": colour[0]} if colour else {}))
    return {"tag": "two_object" if len(include) == 2 else "single_object", "include": include}


def letter_cells(drawing: Drawing) -> NDArray[np.int64]:
    """The letter in each cell; a letter is in the upper and the lower cell of its token row."""
    cells = np.full((CELLS, CELLS), NO_LABEL, np.int64)
    for (row, column), letter in drawing.letters.items():
        cells[row * CELLS_PER_TOKEN : (row + 1) * CELLS_PER_TOKEN, column] = ALPHABET.index(letter)
    return cells.reshape(-1)


def thing_cells(drawing: Drawing) -> NDArray[np.int64]:
    """Shape and colour in each of the four cells of a thing's token."""
    cells = np.full((CELLS, CELLS), NO_LABEL, np.int64)
    for thing in drawing.things:
        top, left = thing.row * CELLS_PER_TOKEN, thing.column * CELLS_PER_TOKEN
        number = SHAPES.index(thing.shape) * len(COLOURS) + list(COLOURS).index(thing.colour)
        cells[top : top + CELLS_PER_TOKEN, left : left + CELLS_PER_TOKEN] = number
    return cells.reshape(-1)
