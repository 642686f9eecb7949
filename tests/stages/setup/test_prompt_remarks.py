"""What is said about prompts before an image is made for them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from gdro_cli.config.load import build_recipe
from gdro_cli.errors import UserError
from gdro_cli.runtime.progress import Reporter
from gdro_cli.stages.planning import dry_run
from gdro_cli.stages.sampling import sample
from gdro_cli.stages.setup.session import Session
from tests.support.jobs import RECIPE

LATIN = 'a sign that says "OPEN"'
CYRILLIC = [f'a sign that says "{word}"' for word in ("\u0425\u041b\u0415\u0411", "\u0414\u041e\u041c")]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GDRO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class Job:
    """A session whose training prompts are these lines, and what it says."""

    def __init__(self, folder: Path, *lines: str, **keys: object) -> None:
        file = folder / "prompts.txt"
        file.write_text("\n".join(lines), encoding="utf-8")
        prompts = {**RECIPE["prompts"], "train": {"file": str(file), **keys}}
        self.recipe, self.out, self._stream = (
            build_recipe({**RECIPE, "prompts": prompts}),
            folder / "out",
            io.StringIO(),
        )
        self.session = Session(self.recipe, self.out, Reporter(Console(file=self._stream, width=1000)))

    @property
    def said(self) -> list[str]:
        return self._stream.getvalue().splitlines()


def test_signs_that_the_recogniser_cannot_read_are_refused_before_sampling(tmp_path: Path) -> None:
    job = Job(tmp_path, *CYRILLIC)
    with pytest.raises(UserError, match=r"PP-OCRv6_small_rec has no letter of any text .* \(\u0431, \u0434, \u0435, "):
        sample.run(job.session)
    assert not job.out.exists()


def test_letters_that_the_recogniser_lacks_are_named(tmp_path: Path) -> None:
    job = Job(tmp_path, LATIN, 'a caf\u00e9 "CAFE\u0301\u2026"', *CYRILLIC)
    assert len(job.session.prompts("train")) == 4
    (said,) = job.said
    assert said.startswith("prompts.train: prompts with letters that the recogniser PP-OCRv6_small_rec does not have")
    assert "(\u0431, \u0434, \u0435, \u043b, \u043c, \u043e, \u0445)" in said and ": 2 of 4; name a recogniser" in said


def test_signs_in_ascii_need_no_look_at_the_recogniser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GDRO_CACHE", str(tmp_path / "none"))
    job = Job(tmp_path, LATIN)
    job.session.prompts("train")
    assert job.said == [] and not (tmp_path / "none").exists()


def test_doubtful_lines_are_said_once_and_shown_by_a_dry_run(tmp_path: Path) -> None:
    job = Job(tmp_path, LATIN, 'a 24" screen with "HI"', LATIN, "no text", skip_bad=True)
    for _ in range(2):
        assert [record.target for record in job.session.prompts("train").records] == ["OPEN", " screen with "]
    left_out, odd, repeated = job.said
    assert left_out.startswith("prompts.train: bad lines left out: 1 (line 4: it has no text in double quotes")
    assert "double quote that has no partner: 1 (line 2: the target is ' screen with ')" in odd
    assert repeated == "prompts.train: prompts left out because they repeat earlier ones: 1"
    rows = dry_run.describe(job.recipe, "sample", job.out)
    assert [f"{name}: {text}" for name, text in rows if name == "prompts.train"] == job.said
