"""Words to and from a vision-language model: a template with a place for the prompt, and the end of an answer."""

from __future__ import annotations

import re
from pathlib import Path

from gdro_cli.errors import UserError
from gdro_cli.files import at_home

PLACE = re.compile(r"\{(?:prompt|caption)\}")
_LARGEST = 1 << 16
_END = re.compile(r"(?:\s*(?:<\|[a-z_]+\|>|</s>|<end_of_turn>))+\s*$")


def read_template(path: str, *, key: str) -> str:
    """The text of a template file, which must have the place ``{prompt}`` (or ``{caption}``).

    Args:
        path: the file.
        key: the recipe's key that names it, for messages.

    Raises:
        UserError: the file cannot be read, is not text, is larger than 64 KiB, or has no such place.
    """
    try:
        data = Path(at_home(path, key=key)).read_bytes()
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{key}: {path} cannot be read as text ({reason}): name a UTF-8 file") from error
    if len(data) > _LARGEST:
        raise UserError(f"{key}: {path} has {len(data):,} bytes, more than {_LARGEST:,}: name a file of one request")
    if not PLACE.search(text):
        raise UserError(f"{key}: {path} has no place {{prompt}} for the image's prompt: add it")
    return text.rstrip("\n")


def filled(template: str, prompt: str) -> str:
    """The template with the prompt in its place. Braces in the prompt have no meaning."""
    return PLACE.sub(lambda _: prompt, template)


def final_text(answer: str) -> str:
    """An answer without what the model thought before it and the end tokens that some servers leave behind it."""
    return _END.sub("", answer.rpartition("</think>")[2].partition("<think>")[0])
