"""The prompt for UnifiedReward 2.0 about one image, and how its answer is read.

UnifiedReward 2.0 (arXiv 2503.05236; github.com/CodeGoat24/UnifiedReward) is tuned on a fixed form: first the image,
then a text with the three axes, the form of the answer, and the caption in square brackets. It answers with three
lines, each with many decimals. ``TEMPLATE`` has the same form as the authors' prompt
(``inference_qwen/UnifiedReward-2.0-inference/point_score_ACS_image_generation.py``), in our own words; `judge.template`
takes a file with theirs.
"""

from __future__ import annotations

import re
from typing import Any

from gdro_cli.files import sha256
from gdro_cli.rewards.chat import filled, final_text
from gdro_cli.rewards.judge.base import AXES, HIGHEST, LOWEST, Judgement, on_scale

RULE = "unified-reward-lines-2"
"""Name of the rule in the provenance; it changes whenever the same answer would be read differently."""
TEMPLATE = """\
You are given a generated image and the text caption that it was made from. Judge the image on three axes, each rated \
from 1 (worst) to 5 (best):
- Alignment Score: how well the content of the image matches the caption.
- Coherence Score: how consistent the image is in itself, free of visual glitches and distorted objects.
- Style Score: how aesthetically pleasing the image is, whether or not it matches the caption.

Answer in this form:

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Text Caption: [{caption}]"""
MAX_TOKENS = 1024
"""Tokens of an answer; three lines need about a hundred."""

_MARGIN = 0.05
_QUOTED = 500
"""Characters of an answer that the details keep."""
_MARKUP = re.compile(r"[*_`#>|]|\\(?=[()\-])")
_BULLET = re.compile(r"^\s*+(?:[-\u2022]|[0-9]{1,2}[.)])\s++")
_LINE = re.compile(
    rf"\s*+(?P<axis>{'|'.join(AXES)})\s++score\s*+(?:\(\s*+1\s*+[-\u2013]\s*+5\s*+\)\s*+)?+:\s*+"
    r"(?P<value>-?[0-9]++(?:\.[0-9]++)?+)(?:\s*+/\s*+5)?+\s*+\.?+\s*+",
    re.IGNORECASE,
)


def request_text(caption: str, *, template: str = TEMPLATE) -> str:
    """The text that is sent with an image. Braces in the caption have no meaning."""
    return filled(template, caption)


def provenance(template: str = TEMPLATE) -> dict[str, Any]:
    """What a judgement depends on besides the model."""
    return {"rule": RULE, "prompt_sha256": sha256(template.encode()), "temperature": 0, "max_tokens": MAX_TOKENS}


def read_answer(answer: str, *, complete: bool = True) -> Judgement:
    """Read the axes from an answer.

    A line counts if it contains only an axis and its number, in upper or lower case, with or without markup, a bullet,
    "(1-5)" or "/5". Nothing is guessed: an axis is missing if it has no such line, is off the scale, or has two
    different numbers. A number up to 0.05 beyond the scale counts as its end. Text in ``<think>``, and end tokens
    behind the answer, which some servers leave there, are not part of it.

    Args:
        answer: the model's text.
        complete: whether the model ended it. If not, its last line may lack digits and is not read.
    """
    final = final_text(answer)
    lines = final.splitlines()
    numbers: dict[str, set[float]] = {axis: set() for axis in AXES}
    for line in lines if complete else lines[:-1]:
        text = _MARKUP.sub("", line).strip()
        match = _LINE.fullmatch(_BULLET.sub("", text))
        if match is not None:
            numbers[match["axis"].lower()].add(float(match["value"]))
    axes: dict[str, float | None] = {}
    problems = []
    for axis, values in numbers.items():
        value = next(iter(values)) if len(values) == 1 else None
        if value is not None and LOWEST - _MARGIN <= value <= HIGHEST + _MARGIN:
            value = min(max(value, LOWEST), HIGHEST)
        axes[axis] = value if value is not None and on_scale(value) else None
        if axes[axis] is None:
            problems.append(_problem(axis, values))
    if problems and not complete:
        problems.append("and was cut off")
    reason = f"the judge's answer {', '.join(problems)}" if problems else None
    return Judgement(axes, reason, {"answer": answer[:_QUOTED]})


def _problem(axis: str, values: set[float]) -> str:
    if not values:
        return f"has no {axis} score"
    numbers = " and ".join(f"{value:g}" for value in sorted(values))
    if len(values) > 1:
        return f"has different {axis} scores ({numbers})"
    return f"has a {axis} score of {numbers}, which is not between {LOWEST:g} and {HIGHEST:g}"
