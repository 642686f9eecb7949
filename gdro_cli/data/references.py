"""Reference errors: the untrained model's error for the velocity of a stored image, cached beside the store.

    store/references/<digest>/manifest.json   what the errors depend on, besides the store
                              *.jsonl         one error per line, appended; a file for each process that computed some

A reference error does not depend on training, so all trainings with the same images, noise levels and noise share it.
A row that cannot be read (because a process was killed while writing it) is computed again.
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
from gdro_cli.files import append_bytes, json_lines, make_folder, parse_json, refuse_links, storage_errors, write_json
from gdro_cli.identity import digest

_KIND = "gdro reference errors"
_FOLDER = "references"

ErrorKey = tuple[str, int, int]
"""Prompt id, number of the draw of noise, and the image's index in its group."""


class ReferenceErrors:
    """The reference errors of one store, for one way of drawing and computing them.

    Args:
        store: the store of the images.
        about: everything else that the errors depend on, as JSON: seed, noise levels, guidance ...

    Raises:
        StoreError: the folder is a link, cannot be read or cannot be written.
    """

    def __init__(self, store: GroupStore, about: Mapping[str, Any]) -> None:
        content = {"kind": _KIND, "schema": 1, **about}
        self.path = store.path / _FOLDER / digest(content)
        refuse_links((self.path.parent, self.path))
        make_folder(self.path)
        if not (self.path / "manifest.json").exists():
            write_json(self.path / "manifest.json", content)
        self._own = self.path / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        with storage_errors(self.path):
            self._errors = _read(self.path)

    def __len__(self) -> int:
        return len(self._errors)

    def lookup(self, keys: Sequence[ErrorKey]) -> Tensor:
        """The errors [N], float32; nan if unknown."""
        return torch.tensor([self._errors.get(key, math.nan) for key in keys], dtype=torch.float32)

    def add(self, keys: Sequence[ErrorKey], errors: Tensor) -> None:
        """Store those of the errors [N] that are finite and not known yet.

        Raises:
            StoreError: the file cannot be written.
        """
        pairs = zip(keys, errors.tolist(), strict=True)
        new = {key: error for key, error in pairs if key not in self._errors and math.isfinite(error)}
        if not new:
            return
        self._errors |= new
        rows = ({"prompt": p, "draw": d, "image": i, "error": error} for (p, d, i), error in new.items())
        append_bytes(self._own, json_lines(rows))


def _read(path: Path) -> dict[ErrorKey, float]:
    errors: dict[ErrorKey, float] = {}
    for line in (line for file in sorted(path.glob("*.jsonl")) for line in file.read_bytes().splitlines()):
        try:
            row = parse_json(line)
            key, error = (str(row["prompt"]), int(row["draw"]), int(row["image"])), float(row["error"])
        except (ValueError, TypeError, KeyError):
            continue
        if math.isfinite(error) and error >= 0:
            errors[key] = error
    return errors
