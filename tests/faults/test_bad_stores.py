"""Group stores, score tables and reference errors that somebody edited, cut, moved or forged."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gdro_cli.config.base import digest
from gdro_cli.files import sha256
from tests.support.faulty import Case, check, outcome, rows
from tests.support.small_store import PROMPTS, use

Harm = Callable[[Path], object]


def edit(name: str, change: Callable[[Any], object], *, forge: bool = False) -> Harm:
    """Change a JSON file of the store; forged, its digest fits again."""

    def harm(path: Path) -> None:
        (file,) = path.glob(name)
        value = json.loads(file.read_text())
        changed = change(value)
        value = value if changed is None else changed
        if forge:
            value["digest"] = digest({key: entry for key, entry in value.items() if key != "digest"})
        file.write_text(json.dumps(value))

    return harm


def put(name: str, data: bytes) -> Harm:
    return lambda path: _only(path, name).write_bytes(data)


def _only(path: Path, name: str) -> Path:
    (file,) = path.glob(name)
    return file


def forged_file(name: str, data: bytes) -> Harm:
    """Another content, and a manifest that it fits."""

    def harm(path: Path) -> None:
        (path / "shards/00000" / name).write_bytes(data)
        manifest = path / "shards/00000/manifest.json"
        value = json.loads(manifest.read_text())
        value["files"][name] = {"bytes": len(data), "sha256": sha256(data)}
        manifest.write_text(json.dumps(value))

    return harm


def forged_rows(data: bytes) -> Harm:
    """Another content, and a first line that it fits."""

    def harm(path: Path) -> None:
        file = _only(path, "scores/*/00000.jsonl")
        head = json.loads(file.read_bytes().partition(b"\n")[0]) | {"sha256": sha256(data)}
        file.write_bytes(json.dumps(head).encode() + b"\n" + data)

    return harm


def changed_rows(change: Callable[[bytes], bytes]) -> Harm:
    """Another content after the old first line."""

    def harm(path: Path) -> None:
        file = _only(path, "scores/*/00000.jsonl")
        head, _, data = file.read_bytes().partition(b"\n")
        file.write_bytes(head + b"\n" + change(data))

    return harm


def link(name: str) -> Harm:
    def harm(path: Path) -> None:
        inside = path / name
        outside = path.parent / "outside"
        shutil.move(inside, outside)
        inside.symlink_to(outside)

    return harm


def rows_of(**changes: Any) -> bytes:
    """The rows of shard 0, the first one changed."""
    names = [(record.id, index) for record in PROMPTS.records[:2] for index in (0, 1)]
    rows_ = [{"prompt_id": n, "index": i, "value": 0.5, "reason": None, "details": {}} for n, i in names]
    return "".join(json.dumps(row | (changes if place == 0 else {})) + "\n" for place, row in enumerate(rows_)).encode()


MANIFEST, SHARD, SCORES = "manifest.json", "shards/00000/manifest.json", "scores/*/manifest.json"
ID = PROMPTS.records[0].id


def _rename_prompt(value: Any) -> None:
    value["prompts"][0]["id"] = "../../../etc"


STORES = [
    Case("untouched", lambda path: None, 0),
    Case("manifest empty", put(MANIFEST, b""), 4, "is not JSON"),
    Case("manifest binary", put(MANIFEST, bytes(range(256))), 4, "is not JSON"),
    Case("manifest a pickle", put(MANIFEST, pickle.dumps({"kind": "gdro group store"})), 4, "is not JSON"),
    Case("manifest a list", put(MANIFEST, b"[]"), 4, "is not a JSON object"),
    Case("manifest of another kind", edit(MANIFEST, lambda v: v.update(kind="x")), 4, "is not a group store"),
    Case("manifest of another schema", edit(MANIFEST, lambda v: v.update(schema=99)), 4, "has schema 99"),
    Case("manifest edited", edit(MANIFEST, lambda v: v.update(images_per_prompt=3)), 4, "does not match its digest"),
    Case("forged count", edit(MANIFEST, lambda v: v.update(images_per_prompt=3), forge=True), 4, "something else"),
    Case(
        "forged format", edit(MANIFEST, lambda v: v.update(image_format="/../x"), forge=True), 4, "another image format"
    ),
    Case("prompt id up", edit(MANIFEST, _rename_prompt, forge=True), 4, "cannot be used"),
    Case("prompt edited", edit(MANIFEST, lambda v: v["prompts"][0].update(prompt="b"), forge=True), 4, "was changed"),
    Case("shard with a strange id", edit(MANIFEST, lambda v: v.update(shards=[["../x"]]), forge=True), 4, "damaged"),
    Case("shard gone", lambda path: shutil.rmtree(path / "shards/00001"), 4, "shard 00001 of the store"),
    Case("shard without manifest", lambda path: (path / SHARD).unlink(), 4, "is missing: run `gdro sample`"),
    Case("shard manifest cut", put(SHARD, b'{"schema": 1'), 4, "is not JSON"),
    Case("shard of another store", edit(SHARD, lambda v: v.update(store="0" * 12)), 4, "another store than"),
    Case("shard names files up", edit(SHARD, lambda v: v["files"].update({"../../../x": 1})), 4, "lists other files"),
    Case(
        "tensors cut",
        lambda path: _cut(path / "shards/00000/tensors.safetensors"),
        4,
        "is missing or does not have 504 bytes",
    ),
    Case("tensors changed", lambda path: _flip(path / "shards/00000/tensors.safetensors"), 4, "its SHA-256 differs"),
    Case("forged tensors: a pickle", forged_file("tensors.safetensors", pickle.dumps({})), 4, "cannot be read"),
    Case("image lost", lambda path: next((path / "shards/00000/images").iterdir()).unlink(), 4, "is missing"),
    Case("image changed", lambda path: _flip(next((path / "shards/00000/images").iterdir())), 4, "its SHA-256 differs"),
    Case("shard is a link", link("shards/00000"), 4, "is a link that leaves its folder"),
    Case("a pickle beside", lambda path: (path / "shards/00000/tensors.pkl").write_bytes(pickle.dumps(1)), 0),
    Case("table manifest edited", edit(SCORES, lambda v: v.update(name="x")), 4, "is damaged"),
    Case("table manifest cut", put(SCORES, b"{"), 4, "is damaged"),
    Case("scores are a link", link("scores"), 4, "is a link that leaves its folder"),
    Case("scores changed", changed_rows(lambda data: data.replace(b"0.5", b"0.9", 1)), 4, "its SHA-256 differs"),
    Case("scores cut", changed_rows(lambda data: data[:-5]), 4, "its SHA-256 differs"),
    Case("forged scores: value a text", forged_rows(rows_of(value="0.5")), 4, "it is not a score of an image"),
    Case("forged scores: value infinite", forged_rows(rows_of(value=float("inf"))), 4, "Infinity is not a JSON number"),
    Case("forged scores: another prompt", forged_rows(rows_of(prompt_id="../x")), 4, "scores of other images"),
]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@rows(STORES)
def test_a_store(case: Case, store: Path) -> None:
    case.given(store)
    check(outcome(lambda: use(store)), case.code, case.words)


GOOD_ROW = json.dumps({"prompt": ID, "draw": 0, "image": 0, "error": 0.25}).encode()
# Reference errors are a cache: a row that cannot be used is computed again, whatever it is.
REFERENCES = [
    Case("torn", GOOD_ROW[:-5], 0),
    Case("no UTF-8", b"\xff\xfe\n", 0),
    Case("error nan", GOOD_ROW.replace(b"0.25", b"NaN"), 0),
    Case("error below 0", GOOD_ROW.replace(b"0.25", b"-1"), 0),
    Case("no error", b'{"prompt": "a", "draw": 0, "image": 0}', 0),
]


@rows(REFERENCES)
def test_a_row_of_reference_errors_that_cannot_be_used_is_left_out(case: Case, store: Path) -> None:
    (folder,) = (store / "references").iterdir()
    (folder / "zz.jsonl").write_bytes(case.given)
    check(outcome(lambda: use(store)), case.code, case.words)
