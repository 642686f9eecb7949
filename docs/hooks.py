"""What the site has beside the Markdown files of ``docs``, so that the same links work on GitHub and in the site.

The pages at the top of the repository become pages of the site, with the README as its first page; recipes are copied
as files; the notebook becomes a page with its pictures. mkdocs calls the functions by their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages, files and notebooks that mkdocs does not take from ``docs`` by itself."""
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        files.append(File.generated(config, f"recipes/{path.name}", abs_src_path=str(path)))
    for path in sorted((ROOT / "docs").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        text = "\n\n".join(block for cell in notebook["cells"] for block in _blocks(cell))
        files.append(File.generated(config, f"{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links out of ``docs`` into links to what ``on_files`` added, and links to notebooks into links to pages."""
    up = "../" * page.file.src_uri.count("/")
    return re.sub(r"(\]\([^)#]*)\.ipynb", r"\1.md", markdown.replace(f"]({up}../", f"]({up}"))


def _blocks(cell: Mapping[str, Any]) -> list[str]:
    """A cell of a notebook and its outputs as Markdown."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    return [_fenced(source, "python"), *map(_output, cell["outputs"])]


def _output(output: Mapping[str, Any]) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        return f"![output](data:image/png;base64,{data['image/png'].strip()})"
    return _fenced("".join(data["text/plain"]), "text")


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
