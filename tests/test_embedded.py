"""The embedded weights are those of this version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gdro_cli import embedded
from gdro_cli.errors import PrerequisiteError


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the judge's weights, with the digests of all weights, in place of the installation."""
    shutil.copytree(embedded.WEIGHTS / "judge", tmp_path / "judge")
    shutil.copy(embedded.DIGESTS, tmp_path)
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path)
    monkeypatch.setattr(embedded, "DIGESTS", tmp_path / embedded.DIGESTS.name)
    embedded._whole.cache_clear()
    yield tmp_path
    embedded._whole.cache_clear()


def test_the_digests_are_those_of_the_files() -> None:
    """If not, weights were made without running `python -m gdro_cli.embedded`."""
    assert json.loads(embedded.DIGESTS.read_text()) == embedded.digests(embedded.WEIGHTS)


def test_a_whole_folder_is_returned(installation: Path) -> None:
    assert embedded.tiny_judge_path() == installation / "judge"


def test_one_wrong_bit_is_an_error(installation: Path) -> None:
    path = installation / "judge" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(PrerequisiteError, match=r"model\.safetensors is not the file that .* reinstall") as caught:
        embedded.tiny_judge_path()
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_error(installation: Path) -> None:
    (installation / "judge" / "config.json").unlink()
    with pytest.raises(PrerequisiteError, match=r"config\.json is missing: reinstall"):
        embedded.tiny_judge_path()


@pytest.mark.parametrize("content", [None, "{"])
def test_nothing_is_trusted_without_digests(installation: Path, content: str | None) -> None:
    path = installation / embedded.DIGESTS.name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(PrerequisiteError, match="cannot be read"):
        embedded.tiny_judge_path()
