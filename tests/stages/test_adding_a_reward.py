"""The reward of docs/adding-a-reward.md as an installed package: the file as the page has it, and an entry point."""

from __future__ import annotations

import csv
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageStat

from gdro_cli.config.recipe import Recipe
from gdro_cli.rewards.base import read_rgb
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.comparison import compare
from gdro_cli.stages.evaluation import evaluate
from gdro_cli.stages.sampling import sample
from gdro_cli.stages.scoring import score
from gdro_cli.stages.setup.session import Session
from gdro_cli.stages.training import train
from tests.support.plugins import install

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-reward.md"
MakeRecipe = Callable[..., Recipe]


def code_of_the_page() -> str:
    """The indented block that begins with a docstring."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith('    """'))
    last = next(number for number in range(first, len(lines)) if lines[number][:1].strip())
    return textwrap.dedent("\n".join(lines[first:last]))


@pytest.fixture
def brightness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The reward's name, while its package is installed."""
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install(tmp_path / "site", "brightness", code_of_the_page(), target="Brightness")
    yield "brightness"
    sys.modules.pop("brightness_reward", None)


def sections(**train_section: Any) -> dict[str, Any]:
    return {
        "name": "bright",
        "prompts": {
            "train": {"builtin": "ocr-train", "count": 4},
            "validation": {"builtin": "geneval-validation", "count": 2},
            "eval": {"builtin": "geneval-test", "count": 4},
        },
        "reward": {"kind": "brightness", "workers": 1},
        "train": {"steps": 2, "eval_every": 2, **train_section},
    }


def test_the_whole_job(brightness: str, make_recipe: MakeRecipe, quiet: Reporter, tmp_path: Path) -> None:
    recipe, out = make_recipe(**sections()), tmp_path / "out"
    store = sample.run(Session(recipe, out, quiet)).store
    assert store.path.name.startswith("flux-")
    table = score.run(Session(recipe, out, quiet)).table
    for number in range(len(store.shards)):
        for image, row in zip(store.images(number), table.read_shard(number), strict=True):
            grey = ImageStat.Stat(read_rgb(image.path).convert("L"))
            assert row.value == grey.mean[0] / 255 and row.details == {"contrast": grey.stddev[0] / 255}
    assert dict(table.provenance) == {
        "reward": "brightness",
        "rule": "mean-grey-1",
        "package": "gdro-reward-brightness 0.1.0",
    }

    run = train.run(Session(recipe, out, quiet)).run
    point = [row for row in run.metrics() if row["kind"] == "validation"][-1]
    assert 0 < point["reward"] < 1 and {"u", "corrected"} <= point.to_json().keys()
    result = evaluate.run(Session(recipe, out, quiet))
    names = ["reward", "contrast", "alignment", "coherence", "style", "u", "corrected", "corrected of the means"]
    assert list(result.results.measures) == names
    assert result.results.failed == result.results.unjudged == 0 and result.grid is not None
    results = json.loads(result.file.read_text())
    assert results["task"] == "brightness" and set(results["measures"]) == set(names)

    with (run.path / "results.csv").open(newline="", encoding="utf-8") as file:
        first = next(iter(csv.DictReader(file)))
    below = f"reward {float(first['value']):.3f} contrast {float(first['contrast']):.2f} u {float(first['u']):.3f}"
    assert below in " ".join(re.sub("<[^>]*>", " ", result.page.read_text()).split())
    assert "to draw bright images" in (run.path / "README.md").read_text()

    other = train.run(Session(make_recipe(**sections(seed=1)), out, quiet)).run
    evaluate.run(Session(make_recipe(**sections(seed=1)), out, quiet))
    compared = compare.run([run.path.name, other.path.name], workspace=out)
    assert list(dict.fromkeys(gain.measure for gain in compared.gains)) == names


def test_the_page_is_about_every_public_name_of_a_reward() -> None:
    from gdro_cli.rewards.base import Reward

    page = PAGE.read_text(encoding="utf-8")
    public = {name for name in (*vars(Reward), *Reward.__annotations__) if not name.startswith("_")}
    assert [name for name in sorted(public - {"settings"}) if f"`{name}" not in page] == []
