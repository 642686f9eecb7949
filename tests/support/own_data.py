"""A user's own data: images and tables as other tools write them, and what a reading refuses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gdro_cli.data.own_data import OwnData, OwnGroup, read_own_data
from gdro_cli.errors import UserError


def image_bytes(grey: int = 0, *, format: str = "JPEG") -> bytes:
    stream = BytesIO()
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(stream, format)
    return stream.getvalue()


def save_images(folder: Path, *names: str) -> Path:
    """Write an image under each name, each of another grey; return the folder."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image_bytes(number, format="PNG" if path.suffix == ".png" else "JPEG"))
    return folder


def write_table(path: Path, *lines: Mapping[str, Any] | str) -> Path:
    """Write JSON Lines; a line that is a text is written as it is."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def scores_of(group: OwnGroup) -> dict[str, dict[str, float]]:
    return {image.source.name: dict(image.scores) for image in group.images}


def all_scores(data: OwnData) -> list[tuple[str, dict[str, dict[str, float]]]]:
    """Prompts and scores by image name."""
    return [(group.record.prompt, scores_of(group)) for group in data.groups]


def refusal(path: Path) -> str:
    """The one sentence with which a path is refused."""
    with pytest.raises(UserError) as caught:
        read_own_data(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def write_parquet(path: Path, columns: Mapping[str, Iterable[Any]], **options: Any) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(dict(columns)), path, **options)
    return path
