"""Score tables: rows, resumption shard by shard, and damaged files."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.data.scores import ScoreRow, ScoreTable, read_scores, write_scores
from gdro_cli.data.store import Group, GroupStore
from gdro_cli.errors import StoreError
from gdro_cli.files import sha256

PROVENANCE = {"engine": "test", "weights": {"det": "0a1b"}}


@pytest.fixture
def table(store: GroupStore) -> ScoreTable:
    return ScoreTable.create_or_open(store, "ocr", provenance=PROVENANCE)


def score(store: GroupStore, number: int) -> list[ScoreRow]:
    """Scores 0, 1/4, 1/2 and a missing one for each group."""
    rows = []
    for image in store.images(number):
        missing = image.index == 3
        value = None if missing else image.index / 4
        rows.append(ScoreRow(image.prompt.id, image.index, value, "no text" if missing else None, {"text": "é“"}))
    return rows


def fill(table: ScoreTable) -> list[ScoreRow]:
    for number in table.missing_shards():
        table.write_shard(number, score(table.store, number))
    return list(table.rows())


def test_rows_are_read_in_the_order_of_the_store(table: ScoreTable) -> None:
    assert table.missing_shards() == [0, 1, 2]
    table.write_shard(2, score(table.store, 2))
    table.write_shard(0, score(table.store, 0))
    assert table.missing_shards() == [1]
    rows = fill(table)
    expected = [(prompt.id, index) for prompt in table.store.prompts for index in range(4)]
    assert [(row.prompt_id, row.index) for row in rows] == expected
    assert rows == [row for number in range(3) for row in score(table.store, number)]


def test_rows_cannot_be_read_while_some_are_missing(table: ScoreTable) -> None:
    table.write_shard(0, score(table.store, 0))
    with pytest.raises(StoreError, match="has no scores of shard 00001: run `gdro score`"):
        list(table.rows())


def test_the_scores_are_found_again_but_not_for_another_provenance(table: ScoreTable) -> None:
    fill(table)
    again = ScoreTable.create_or_open(table.store, "ocr", provenance=dict(reversed(PROVENANCE.items())))
    assert again == table and again.missing_shards() == []
    for name, provenance in (("ocr", PROVENANCE | {"engine": "next"}), ("other", PROVENANCE)):
        assert ScoreTable.create_or_open(table.store, name, provenance=provenance).missing_shards() == [0, 1, 2]


def test_summary(table: ScoreTable) -> None:
    """Of 5 groups of 4: 15 scores with mean (0 + 1/4 + 1/2) / 3 = 1/4, and 5 missing."""
    assert table.summary().images == 0 and table.summary().missing_share == 0 and table.summary().mean is None
    fill(table)
    summary = table.summary()
    assert (summary.images, summary.scored, summary.mean) == (20, 15, 0.25)
    assert summary.missing_share == 0.25 and summary.reasons == (("no text", 5),)


@pytest.mark.parametrize(
    ("value", "reason"), [(None, None), (0.5, "both"), (math.nan, None), (math.inf, None), (-math.inf, None)]
)
def test_a_row_has_a_finite_value_or_a_reason(value: float | None, reason: str | None) -> None:
    with pytest.raises(ValueError):
        ScoreRow("0123456789ab", 0, value, reason)


def test_rows_that_do_not_match_the_shard_are_programming_errors(table: ScoreTable) -> None:
    rows = score(table.store, 0)
    for wrong in (rows[:-1], rows[::-1], [*rows, rows[0]], score(table.store, 1)):
        with pytest.raises(ValueError):
            table.write_shard(0, wrong)
    with pytest.raises(ValueError):
        table.write_shard(0, [ScoreRow(row.prompt_id, row.index, 0.0, None, {"x": math.nan}) for row in rows])
    assert table.missing_shards() == [0, 1, 2]


def test_a_shard_that_was_made_again_is_scored_again_only_if_it_differs(
    table: ScoreTable, make_group: Callable[..., Group]
) -> None:
    fill(table)
    store = table.store
    groups = [make_group(prompt) for prompt in store.shards[1]]
    shutil.rmtree(store.path / "shards" / "00001")
    with pytest.raises(StoreError, match=r"shard 00001 of the store .* is missing: run `gdro sample`"):
        table.missing_shards()
    store.write_shard(1, groups)
    assert table.missing_shards() == []
    groups[0] = Group(groups[0].prompt, groups[0].latents, groups[0].conditioning, groups[0].images, [{"seed": 9}] * 4)
    store.write_shard(1, groups)
    assert table.missing_shards() == [1]
    assert len(fill(table)) == 20


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "its SHA-256 differs"),
        (lambda path: path.write_text(path.read_text().replace("0.25", "0.75")), "its SHA-256 differs"),
        (lambda path: path.write_text("{"), "its first line is not JSON"),
        (lambda path: path.write_bytes(b""), "its first line is not JSON"),
    ],
)
def test_the_error_for_damaged_scores_names_the_remedy(
    table: ScoreTable, harm: Callable[[Path], Any], expected: str
) -> None:
    rows = fill(table)
    harm(table.path / "00001.jsonl")
    with pytest.raises(
        StoreError, match=rf"00001.jsonl is damaged \({expected}\): delete it and run `gdro score`, which scores shard"
    ):
        list(table.rows())
    (table.path / "00001.jsonl").unlink()
    assert table.missing_shards() == [1]
    assert fill(table) == rows


def test_scores_copied_from_another_table_are_not_used(table: ScoreTable) -> None:
    fill(table)
    other = ScoreTable.create_or_open(table.store, "other", provenance={})
    fill(other)
    shutil.copy(other.path / "00001.jsonl", table.path / "00001.jsonl")
    assert table.missing_shards() == [1]


def test_an_edited_or_linked_table_is_refused(table: ScoreTable, tmp_path: Path) -> None:
    manifest = table.path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"name": "better"}))
    with pytest.raises(StoreError, match="was changed"):
        ScoreTable.create_or_open(table.store, "ocr", provenance=PROVENANCE)
    manifest.write_text("{")
    with pytest.raises(StoreError, match="is not JSON"):
        ScoreTable.create_or_open(table.store, "ocr", provenance=PROVENANCE)
    shutil.move(table.path, tmp_path / "outside")
    table.path.symlink_to(tmp_path / "outside")
    with pytest.raises(StoreError, match="link that leaves its folder"):
        ScoreTable.create_or_open(table.store, "ocr", provenance=PROVENANCE)


def test_a_table_in_a_read_only_store(
    open_folder: Path, open_store: Callable[..., GroupStore], unprivileged: Callable[[], Any]
) -> None:
    store = open_store(open_folder / "store")
    store.path.chmod(0o555)
    with unprivileged(), pytest.raises(StoreError, match="no permission to write there"):
        ScoreTable.create_or_open(store, "ocr", provenance=PROVENANCE)


@pytest.mark.parametrize(
    "changes",
    [{"value": "0.5"}, {"value": math.inf}, {"reason": "and a value"}, {"details": []}, {"more": 1}, {"index": 1}],
    ids=str,
)
def test_rows_that_are_not_scores_of_the_images_are_damaged(changes: dict[str, Any], tmp_path: Path) -> None:
    """Even if their digest is right."""
    row = {"prompt_id": "a", "index": 0, "value": 0.5, "reason": None, "details": {}}
    lines = json.dumps(row | changes).encode() + b"\n"
    (tmp_path / "00000.jsonl").write_bytes(json.dumps({"sha256": sha256(lines)}).encode() + b"\n" + lines)
    with pytest.raises(StoreError, match=r"00000.jsonl is damaged \(.*\): delete it"):
        read_scores(tmp_path / "00000.jsonl", [("a", 0)], remedy="delete it")


def test_scores_are_read_only_for_the_images_that_they_were_written_for(tmp_path: Path) -> None:
    path = tmp_path / "00000.jsonl"
    rows = [ScoreRow("a", 0, 0.5, None, {"text": "é“"}), ScoreRow("a", 1, None, "no text")]
    write_scores(path, rows)
    assert read_scores(path, [("a", 0), ("a", 1)], remedy="") == rows
    with pytest.raises(StoreError, match=r"is damaged \(it has scores of other images\)"):
        read_scores(path, [("a", 0), ("b", 1)], remedy="delete it")
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.9"))
    with pytest.raises(StoreError, match=r"is damaged \(its SHA-256 differs\)"):
        read_scores(path, [("a", 0), ("a", 1)], remedy="delete it")
