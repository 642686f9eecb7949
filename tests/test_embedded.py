"""The embedded weights are the ones that this version came with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from gdro_cli import embedded as assets
from gdro_cli.errors import PrerequisiteError


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the judge's weights with the digests of all, taken for the installed ones."""
    shutil.copytree(assets.WEIGHTS / "judge", tmp_path / "judge")
    shutil.copy(assets.DIGESTS, tmp_path)
    monkeypatch.setattr(assets, "WEIGHTS", tmp_path)
    monkeypatch.setattr(assets, "DIGESTS", tmp_path / assets.DIGESTS.name)
    assets._whole.cache_clear()
    yield tmp_path
    assets._whole.cache_clear()


def test_the_digests_are_those_of_the_files() -> None:
    """After making weights: python -m gdro_cli.embedded."""
    assert json.loads(assets.DIGESTS.read_text()) == assets.digests(assets.WEIGHTS)


def test_a_whole_folder_is_returned(installation: Path) -> None:
    assert assets.tiny_judge_path() == installation / "judge"


def test_one_wrong_bit_is_noticed(installation: Path) -> None:
    path = installation / "judge" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(PrerequisiteError, match=r"model\.safetensors is not the file that .* reinstall") as caught:
        assets.tiny_judge_path()
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_noticed(installation: Path) -> None:
    (installation / "judge" / "config.json").unlink()
    with pytest.raises(PrerequisiteError, match=r"config\.json is missing: reinstall"):
        assets.tiny_judge_path()


@pytest.mark.parametrize("content", [None, "{"])
def test_without_digests_nothing_is_trusted(installation: Path, content: str | None) -> None:
    path = installation / assets.DIGESTS.name
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(PrerequisiteError, match="cannot be read"):
        assets.tiny_judge_path()
