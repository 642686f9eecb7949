"""Reference errors: how far the untrained model is from the velocity of a stored image, kept beside the store.

    store/references/<digest>/manifest.json   what the errors depend on, beside the store
                              *.jsonl         rows, one error per line, appended; a file per process that computed some

Nothing that is trained enters a reference error, so all trainings that draw the same images, noise levels and noise
share them. It is a cache: a row that cannot be read (a process was killed while it wrote) is computed again.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdro_cli.data.store import GroupStore
from gdro_cli.errors import StoreError
from gdro_cli.files import append_bytes, json_lines, make_folder, parse_json, read_bytes, reading, write_json
from gdro_cli.identity import digest

_KIND = "gdro reference errors"
_FOLDER = "references"

Place = tuple[str, int, int]
"""Prompt id, number of the draw of noise, and the image's place in its group."""


class ReferenceErrors:
    """The reference errors of one store and one way of drawing and computing them.

    Args:
        store: whose images they are about.
        about: all that the errors depend on beside the store, as JSON: seed, noise levels, guidance ...

    Raises:
        StoreError: the folder is a link, cannot be read or cannot be written.
    """

    def __init__(self, store: GroupStore, about: Mapping[str, Any]) -> None:
        content = {"kind": _KIND, "schema": 1, **about}
        self.path = store.path / _FOLDER / digest(content)
        for folder in (self.path.parent, self.path):
            if folder.is_symlink():
                raise StoreError(f"{folder} is a link that leaves the store: delete it and run the command again")
        make_folder(self.path)
        if not (self.path / "manifest.json").exists():
            write_json(self.path / "manifest.json", content)
        self._own = self.path / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._known = dict(_read(self.path))

    def __len__(self) -> int:
        return len(self._known)

    def known(self, places: Sequence[Place]) -> Tensor:
        """The errors [N] that are known, float32; nan where one is not."""
        return torch.tensor([self._known.get(place, math.nan) for place in places], dtype=torch.float32)

    def add(self, places: Sequence[Place], errors: Tensor) -> None:
        """Keep the errors [N] of places that are not known yet; those that are no number are left out.

        Raises:
            StoreError: the disk refuses.
        """
        found = zip(places, errors.tolist(), strict=True)
        new = {place: error for place, error in found if place not in self._known and math.isfinite(error)}
        if not new:
            return
        self._known |= new
        rows = ({"prompt": p, "draw": d, "image": i, "error": error} for (p, d, i), error in new.items())
        append_bytes(self._own, json_lines(rows))


def _read(path: Path) -> dict[Place, float]:
    found: dict[Place, float] = {}
    for file in sorted(path.glob("*.jsonl")):
        if file.is_symlink() or not file.is_file():
            continue
        with reading(file):
            lines = read_bytes(file).splitlines()
        for line in lines:
            try:
                row = parse_json(line)
                place, value = (str(row["prompt"]), int(row["draw"]), int(row["image"])), float(row["error"])
            except (ValueError, TypeError, KeyError, OverflowError):
                continue
            if math.isfinite(value) and value >= 0:
                found[place] = value
    return found
