"""Markdown pages from templates. Everything that was not written here is escaped: it shows as the text that it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gdro_cli.stages.reporting.html import VERDICTS, change, interval, number

_MEANS_SOMETHING = re.compile(r"([\\`*_{}\[\]()<>#|~$&!@^=])")


class Markdown(str):
    """A text that is Markdown already and is not escaped again."""

    __slots__ = ()


def escape(text: object) -> Markdown:
    """Any value as one line of plain text; nothing in it is markup, HTML or the end of a table's cell."""
    if isinstance(text, Markdown):
        return text
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    escaped = _MEANS_SOMETHING.sub(r"\\\1", line)
    return Markdown(re.sub(r"^([-+:]|\d+[.)])", lambda start: start[0][:-1] + "\\" + start[0][-1], escaped))


def fenced(text: str, language: str) -> Markdown:
    """A block of code; its fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def render(template: str, **content: Any) -> bytes:
    """Fill a Markdown template of this package and return the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=False,  # that would be HTML's; finalize escapes for Markdown
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        number=lambda value: Markdown(number(value)),
        interval=lambda value: Markdown(interval(value)),
        change=lambda value: Markdown(change(value)),
    )
    environment.globals.update(verdict_text=lambda level: VERDICTS.get(level, str(level)))
    return environment.get_template(template).render(**content).encode()
