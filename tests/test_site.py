"""The documentation as a site (`make docs`): it builds without a warning, and loads nothing from another host."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
OTHER_HOST = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//|<link\b[^>]*\bhref=["']?(?:https?:)?//"""
    r"""|@import\s+["']?(?:url\()?["']?(?:https?:)?//|url\(["']?(?:https?:)?//"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    files = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert [path.name for path in files if OTHER_HOST.search(path.read_text(encoding="utf-8"))] == []
    for tag in (
        '<script async src="https://a.b/c.js">',
        "<link rel=stylesheet href=//a.b/c.css>",
        "url('https://a.b')",
    ):
        assert OTHER_HOST.search(tag)


def test_it_has_every_page_and_what_they_link_to(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    pages |= {Path(name) for name in ("index.html", "CONTRIBUTING.html", "CHANGELOG.html", "demo.html", "404.html")}
    assert {path.relative_to(site) for path in site.rglob("*.html")} == pages
    assert (site / "recipes" / "ocr.yaml").read_text() == (ROOT / "recipes" / "ocr.yaml").read_text()
    assert 'href="tutorials/your-own-reward.html"' in (site / "index.html").read_text(encoding="utf-8")
    assert 'href="../demo.html"' in (site / "tutorials" / "reading-a-verdict.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in (site / "demo.html").read_text(encoding="utf-8")


def test_the_python_interface_has_docstrings(site: Path) -> None:
    page = (site / "python.html").read_text(encoding="utf-8")
    for name in ("rewards.Reward.score_image", "core.losses.gdro_loss", "data.store.GroupStore.open"):
        assert f'id="gdro_cli.{name}"' in page
    assert "It describes itself without loading weights, and it scores." in page
