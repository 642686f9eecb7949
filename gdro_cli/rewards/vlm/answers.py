"""How the answers of a vision-language model are read: a rating, or how likely it says yes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from gdro_cli.rewards.chat import final_text

RATING = """\
Look at the image. It was made from this prompt:

{prompt}

How well does the image show what the prompt asks for, and how good is it as an image? Answer with one line, a number \
from LOW (worst) to HIGH (best):

Score: X"""
YES_NO = """\
Does this image show what the prompt asks for? Answer with one word, yes or no.

Prompt: {prompt}"""
EDIT_RATING = """\
The first image was edited into the second. The instruction was:

{prompt}

How well does the second image do what the instruction asks for, with everything else as in the first, and how good is \
it as an image? Answer with one line, a number from LOW (worst) to HIGH (best):

Score: X"""
EDIT_YES_NO = """\
The first image was edited into the second. Does the second image do what the instruction asks for, with everything \
else as in the first? Answer with one word, yes or no.

Instruction: {prompt}"""
QUESTION = """\
{prompt} Answer with one word, yes or no."""
RULE = "vlm-3"
"""Name of the rule in the provenance; it changes whenever the same answer would be read differently, or the same edit
would be asked about in other words."""

_MARGIN = 0.0125
"""Share of the scale by which a number may lie beyond it: 0.05 of 1 to 5, as for the judge."""
_MARKUP = re.compile(r"[*_`#>]")
_SCORE = re.compile(
    r"(?:[a-z ]{0,40}(?:score|rating)\s*(?:\([^()]{0,20}\)\s*)?[:=]\s*)?(-?[0-9]{1,6}(?:\.[0-9]{1,12})?)"
    r"(?:\s*/\s*([0-9]{1,4}))?\s*\.?",
    re.IGNORECASE,
)
_WORD = re.compile(r"[a-z]+", re.IGNORECASE)


class UnusableAnswerError(Exception):
    """An answer has no number, or no yes or no; the message is the reason."""


def read_rating(answer: str, *, low: float, high: float) -> float:
    """The number of an answer, as a share of the scale: 0 for ``low``, 1 for ``high``.

    A line counts if it has only a number, with or without "Score:" before it and "/5", the end of the scale, behind it.
    A number beyond the scale by at most 0.0125 of its range counts as its end. Nothing is guessed.

    Raises:
        UnusableAnswerError: no line has a number, lines have different ones, or it is off the scale.
    """
    matches = [match for line in final_text(answer).splitlines() if (match := _SCORE.fullmatch(_plain(line)))]
    for match in matches:
        if match[2] is not None and float(match[2]) != high:
            raise UnusableAnswerError(f"is a number out of {match[2]}, not out of {high:g}")
    numbers = {float(match[1]) for match in matches}
    if len(numbers) != 1:
        found = " and ".join(f"{number:g}" for number in sorted(numbers)) or "no number"
        raise UnusableAnswerError(f"has {found}, not one score")
    (number,) = numbers
    margin = _MARGIN * (high - low)
    if not low - margin <= number <= high + margin:
        raise UnusableAnswerError(f"has the score {number:g}, which is not between {low:g} and {high:g}")
    return (min(max(number, low), high) - low) / (high - low)


def read_yes(answer: str, first: Mapping[str, float]) -> float:
    """How likely the answer is yes, 0 to 1.

    By the probabilities of its first token, P(yes) / (P(yes) + P(no)), if the two have most of the probability; else 1
    or 0 by its first word.

    Args:
        answer: the text.
        first: probabilities of the likeliest first tokens; empty if they are unknown.

    Raises:
        UnusableAnswerError: it says neither.
    """
    share = {"yes": 0.0, "no": 0.0}
    for token, probability in first.items():
        word = token.strip(" \u2581\u0120").lower()
        if word in share:
            share[word] += probability
    if (total := sum(share.values())) > 0.5:
        return share["yes"] / total
    word_found = _WORD.search(final_text(answer))
    word = word_found[0].lower() if word_found else ""
    if word not in share:
        raise UnusableAnswerError("says neither yes nor no")
    return float(word == "yes")


def mean_of(values: Sequence[float], *, geometric: bool) -> float:
    """The arithmetic or geometric mean; the geometric one is 0 if a value is."""
    if not geometric:
        return math.fsum(values) / len(values)
    return 0.0 if min(values) <= 0 else math.exp(math.fsum(map(math.log, values)) / len(values))


def _plain(line: str) -> str:
    return _MARKUP.sub("", line).strip()
