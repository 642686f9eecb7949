"""Reference errors, cached beside a store."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from gdro_cli.data.references import ReferenceErrors
from gdro_cli.data.store import GroupStore
from gdro_cli.errors import StoreError

ABOUT = {"seed": 0, "sigma": [0.0, 1.0]}
KEYS = [("a", 0, 1), ("a", 0, 2), ("b", 3, 0)]


def test_the_next_process_reads_the_same_errors_bit_for_bit(store: GroupStore) -> None:
    first = ReferenceErrors(store, ABOUT)
    assert first.lookup(KEYS).isnan().all()
    errors = torch.tensor([1 / 3, 0.1, 2e-7])
    first.add(KEYS[:2], errors[:2])
    first.add(KEYS[1:], errors[1:])  # a known error is not written twice
    again = ReferenceErrors(store, ABOUT)
    assert len(again) == 3 and torch.equal(again.lookup(KEYS), errors)
    assert again.lookup([("a", 1, 1)]).isnan().all()
    assert sum(len(path.read_text().splitlines()) for path in again.path.glob("*.jsonl")) == 3


def test_other_draws_have_other_errors(store: GroupStore) -> None:
    ReferenceErrors(store, ABOUT).add(KEYS, torch.ones(3))
    assert len(ReferenceErrors(store, ABOUT | {"seed": 1})) == 0


def test_the_error_of_a_damaged_row_is_unknown(store: GroupStore) -> None:
    table = ReferenceErrors(store, ABOUT)
    table.add(KEYS, torch.tensor([1.0, 2.0, math.nan]))  # nan is not stored
    (path,) = table.path.glob("*.jsonl")
    row = {"prompt": "b", "draw": 3, "image": 0}
    more = ["{", "7", json.dumps(row), json.dumps(row | {"error": -1}), '{"prompt": "b", "draw": 3, "image": 0, "err']
    path.write_text(path.read_text() + "\n".join(more))
    again = ReferenceErrors(store, ABOUT)
    assert again.lookup(KEYS).tolist()[:2] == [1.0, 2.0] and len(again) == 2


def test_a_link_out_of_the_store_is_refused(store: GroupStore, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (store.path / "references").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is a link that leaves its folder"):
        ReferenceErrors(store, ABOUT)
