"""Markdown pages from templates. Text from data is escaped: it shows as it is and is never markup."""

from __future__ import annotations

import re
from typing import Any

from gdro_cli.stages.reporting.html import environment
from gdro_cli.stages.reporting.number_format import difference, interval, number

_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#|~$&!@^=])")


class Markdown(str):
    """A text that is Markdown already and is not escaped again."""

    __slots__ = ()


def escape(text: object) -> Markdown:
    """Any value as one line of plain text; nothing in it is markup, HTML or the end of a table's cell."""
    if isinstance(text, Markdown):
        return text
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    escaped = _MARKUP.sub(r"\\\1", line)
    return Markdown(re.sub(r"^([-+:]|\d+[.)])", lambda start: start[0][:-1] + "\\" + start[0][-1], escaped))


def fenced(text: str, language: str) -> Markdown:
    """A block of code; its fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def render(template: str, **content: Any) -> bytes:
    """Fill a Markdown template and return the page."""
    filling = environment(autoescape=False, finalize=escape)  # autoescape would be HTML's
    filling.filters.update(
        number=lambda value: Markdown(number(value)),
        interval=lambda value: Markdown(interval(value)),
        difference=lambda value: Markdown(difference(value)),
    )
    return filling.get_template(template).render(**content).encode()
