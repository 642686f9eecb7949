"""What experiment trackers get: each installed one with its own files, without a network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gdro_cli.runtime.distributed import make_engine

pytestmark = pytest.mark.slow

NAME, STEP = "validation/images", 20


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    """A sheet whose left half is red."""
    image = Image.new("RGB", (60, 30), "white")
    image.paste((200, 0, 0), (0, 0, 30, 30))
    image.save(tmp_path / "sheet.png")
    return tmp_path / "sheet.png"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_SILENT": "true",
    }.items():
        monkeypatch.setenv(name, value)
    yield


def send(tracker: str, sheet: Path) -> None:
    engine = make_engine(trackers=[tracker], out=sheet.parent, cpu=True)
    engine.start_trackers({"recipe": "small"})
    engine.log({"validation/reward": 0.5}, STEP)
    engine.log_image(NAME, sheet, STEP)
    engine.end()


def same(image: Image.Image, sheet: Path) -> bool:
    with Image.open(sheet) as expected:
        return bool(np.array_equal(np.asarray(image.convert("RGB")), np.asarray(expected)))


def test_tensorboard_gets_the_sheet_of_a_step(sheet: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    send("tensorboard", sheet)
    events = EventAccumulator(str(sheet.parent / "gdro"))
    events.Reload()
    (found,) = events.Images(NAME)
    (sheet.parent / "found.png").write_bytes(found.encoded_image_string)
    assert found.step == STEP
    with Image.open(sheet.parent / "found.png") as image:
        assert same(image, sheet)


@pytest.mark.parametrize(("tracker", "pattern"), [("wandb", "wandb/**/*.png"), ("trackio", "trackio/**/*.png")])
def test_others_keep_the_sheet_as_a_file(tracker: str, pattern: str, sheet: Path) -> None:
    pytest.importorskip(tracker)
    send(tracker, sheet)
    (found,) = sheet.parent.glob(pattern)
    with Image.open(found) as image:
        assert same(image, sheet)
    assert re.search(rf"[/_]{STEP}[/_]", str(found))
