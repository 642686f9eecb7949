"""Group stores, score tables and reference errors that somebody edited, cut, moved or forged."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gdro_cli.files import sha256
from gdro_cli.identity import digest
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
    def harm(path: Path) -> None:
        rows_file = _only(path, "scores/*/00000.jsonl")
        rows_file.write_bytes(data)
        manifest = rows_file.with_suffix(".json")
        value = json.loads(manifest.read_text()) | {"bytes": len(data), "sha256": sha256(data)}
        manifest.write_text(json.dumps(value))

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
    Case("manifest of 100,000 brackets", put(MANIFEST, b"[" * 100_000), 4, "is not JSON"),
    Case("manifest a list", put(MANIFEST, b"[]"), 4, "is not a group store"),
    Case("manifest null", put(MANIFEST, b"null"), 4, "is not a group store"),
    Case("manifest of another kind", edit(MANIFEST, lambda v: v.update(kind="x")), 4, "is not a group store"),
    Case("manifest of another schema", edit(MANIFEST, lambda v: v.update(schema=99)), 4, "has schema 99"),
    Case("manifest without schema", edit(MANIFEST, lambda v: v.pop("schema") and None), 4, "has schema None"),
    Case("manifest edited", edit(MANIFEST, lambda v: v.update(images_per_prompt=3)), 4, "does not match its digest"),
    Case("manifest without digest", edit(MANIFEST, lambda v: v.pop("digest") and None), 4, "does not match its digest"),
    Case("digest a list", edit(MANIFEST, lambda v: v.update(digest=[])), 4, "does not match its digest"),
    Case("forged count", edit(MANIFEST, lambda v: v.update(images_per_prompt=3), forge=True), 4, "something else"),
    Case("forged count 0", edit(MANIFEST, lambda v: v.update(images_per_prompt=0), forge=True), 4, "impossible value"),
    Case("forged count a text", edit(MANIFEST, lambda v: v.update(images_per_prompt="2"), forge=True), 4, "impossible"),
    Case("forged huge count", edit(MANIFEST, lambda v: v.update(images_per_prompt=10**12), forge=True), 4, "else"),
    Case("forged format", edit(MANIFEST, lambda v: v.update(image_format="/../x"), forge=True), 4, "impossible value"),
    Case("forged identity", edit(MANIFEST, lambda v: v.update(identity={"steps": 4}), forge=True), 4, "something else"),
    Case("identity a list", edit(MANIFEST, lambda v: v.update(identity=[]), forge=True), 4, "impossible value"),
    Case("no identity", edit(MANIFEST, lambda v: v.pop("identity") and None, forge=True), 4, "cannot be used"),
    Case("prompts a number", edit(MANIFEST, lambda v: v.update(prompts=3), forge=True), 4, "cannot be used"),
    Case("prompts null", edit(MANIFEST, lambda v: v.update(prompts=[None]), forge=True), 4, "cannot be used"),
    Case("prompt id up", edit(MANIFEST, _rename_prompt, forge=True), 4, "cannot be used"),
    Case("prompt edited", edit(MANIFEST, lambda v: v["prompts"][0].update(prompt="b"), forge=True), 4, "was changed"),
    Case("prompt a list", edit(MANIFEST, lambda v: v["prompts"][0].update(prompt=[]), forge=True), 4, "wrong type"),
    Case("shard with a strange id", edit(MANIFEST, lambda v: v.update(shards=[["../x"]]), forge=True), 4, "damaged"),
    Case("shards a text", edit(MANIFEST, lambda v: v.update(shards="abc"), forge=True), 4, "cannot be used"),
    Case("shards empty", edit(MANIFEST, lambda v: v.update(shards=[]), forge=True), 4, "each prompt once"),
    Case("a shard twice", edit(MANIFEST, lambda v: v["shards"].append(v["shards"][0]), forge=True), 4, "once"),
    Case("shard gone", lambda path: shutil.rmtree(path / "shards/00001"), 4, "shard 00001 of the store"),
    Case("shard without manifest", lambda path: (path / SHARD).unlink(), 4, "is missing: run `gdro sample`"),
    Case("shard manifest null", put(SHARD, b"null"), 4, "is not a JSON object"),
    Case("shard manifest cut", put(SHARD, b'{"schema": 1'), 4, "is not JSON"),
    Case("shard of another store", edit(SHARD, lambda v: v.update(store="0" * 12)), 4, "another store than"),
    Case("shard of another schema", edit(SHARD, lambda v: v.update(schema=2)), 4, "another schema than"),
    Case("shard of another number", edit(SHARD, lambda v: v.update(shard=1)), 4, "another shard than"),
    Case("shard names files up", edit(SHARD, lambda v: v["files"].update({"../../../x": 1})), 4, "lists other files"),
    Case(
        "shard names an absolute file", edit(SHARD, lambda v: v["files"].update({"/etc/passwd": 1})), 4, "other files"
    ),
    Case("size a text", edit(SHARD, lambda v: v["files"]["index.jsonl"].update(bytes="9")), 4, "index.jsonl has"),
    Case("digest null", edit(SHARD, lambda v: v["files"]["index.jsonl"].update(sha256=None)), 4, "was changed"),
    Case("tensors cut", lambda path: _cut(path / "shards/00000/tensors.safetensors"), 4, "bytes instead of"),
    Case("tensors changed", lambda path: _flip(path / "shards/00000/tensors.safetensors"), 4, "was changed"),
    Case("forged tensors: a pickle", forged_file("tensors.safetensors", pickle.dumps({})), 4, "cannot be read"),
    Case("forged tensors: nothing", forged_file("tensors.safetensors", b""), 4, "cannot be read"),
    Case("forged tensors: huge header", forged_file("tensors.safetensors", b"\xff" * 8 + b"{}"), 4, "cannot be read"),
    Case("forged tensors: none", forged_file("tensors.safetensors", b"\x02" + bytes(7) + b"{}"), 4, "has no latents"),
    Case("forged index: nothing", forged_file("index.jsonl", b""), 4, "lists other images"),
    Case("forged index: a number", forged_file("index.jsonl", b"3\n"), 4, "a row that cannot be read"),
    Case("forged index: infinite seed", forged_file("index.jsonl", b'{"prompt_id": 1, "index": 0, "seed": 1e999}'), 4),
    Case("picture lost", lambda path: next((path / "shards/00000/images").iterdir()).unlink(), 4, "is missing"),
    Case("picture changed", lambda path: _flip(next((path / "shards/00000/images").iterdir())), 4, "was changed"),
    Case("shard is a link", link("shards/00000"), 4, "is a link that leaves the store"),
    Case("tensors are a link", link("shards/00000/tensors.safetensors"), 4, "is not a regular file"),
    Case("a pickle beside", lambda path: (path / "shards/00000/tensors.pkl").write_bytes(pickle.dumps(1)), 0),
    Case("strange files beside", lambda path: (path / "shards/notes.txt").write_text("hello"), 0),
    Case("table manifest edited", edit(SCORES, lambda v: v.update(name="x")), 4, "is damaged"),
    Case("table manifest null: written again", put(SCORES, b"null"), 0),
    Case("table manifest cut", put(SCORES, b"{"), 4, "is damaged"),
    Case("table manifest of brackets", put(SCORES, b"[" * 100_000), 4, "is damaged"),
    Case("scores are a link", link("scores"), 4, "is a link that leaves the store"),
    Case("score digests cut", put("scores/*/00000.json", b"{"), 4, "is not JSON"),
    Case("score digests a list", put("scores/*/00000.json", b"[]"), 4, "has other keys"),
    Case("scores changed", put("scores/*/00000.jsonl", rows_of(value=0.9)), 4, "was changed"),
    Case("scores cut", put("scores/*/00000.jsonl", rows_of()[:-5]), 4, "bytes instead of"),
    Case("forged scores: no rows", forged_rows(b""), 4, "lists other images"),
    Case("forged scores: a number", forged_rows(b"3\n"), 4, "a row that cannot be read"),
    Case("forged scores: value a text", forged_rows(rows_of(value="0.5")), 4, "a row that cannot be read"),
    Case("forged scores: value a list", forged_rows(rows_of(value=[])), 4, "a row that cannot be read"),
    Case("forged scores: value infinite", forged_rows(rows_of(value=float("inf"))), 4, "a row that cannot be read"),
    Case("forged scores: 400 digits", forged_rows(rows_of(value=10**400)), 4, "a row that cannot be read"),
    Case("forged scores: value and reason", forged_rows(rows_of(reason="x")), 4, "a row that cannot be read"),
    Case("forged scores: details a list", forged_rows(rows_of(details=[])), 4, "a row that cannot be read"),
    Case("forged scores: another key", forged_rows(rows_of(x=1)), 4, "a row that cannot be read"),
    Case("forged scores: another prompt", forged_rows(rows_of(prompt_id="../x")), 4, "lists other images"),
    Case("forged scores: brackets", forged_rows(b"[" * 100_000), 4, "a row that cannot be read"),
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
    Case("a number", b"3\n", 0),
    Case("null", b"null\n", 0),
    Case("no UTF-8", b"\xff\xfe\n", 0),
    Case("NUL", bytes(100), 0),
    Case("brackets", b"[" * 100_000, 0),
    Case("image infinite", GOOD_ROW.replace(b'"image": 0', b'"image": 1e999'), 0),
    Case("draw of 400 digits", GOOD_ROW.replace(b'"draw": 0', b'"draw": ' + b"9" * 400), 0),
    Case("error of 400 digits", GOOD_ROW.replace(b"0.25", b"9" * 400), 0),
    Case("error infinite", GOOD_ROW.replace(b"0.25", b"Infinity"), 0),
    Case("error nan", GOOD_ROW.replace(b"0.25", b"NaN"), 0),
    Case("error below 0", GOOD_ROW.replace(b"0.25", b"-1"), 0),
    Case("error a text", GOOD_ROW.replace(b"0.25", b'"x"'), 0),
    Case("error a list", GOOD_ROW.replace(b"0.25", b"[]"), 0),
    Case("no error", b'{"prompt": "a", "draw": 0, "image": 0}', 0),
    Case("a pickle", pickle.dumps({"error": 1}), 0),
    Case("10 MB in a line", b"x" * 10_000_000, 0),
]


@rows(REFERENCES)
def test_a_row_of_reference_errors_that_cannot_be_used_is_left_out(case: Case, store: Path) -> None:
    (folder,) = (store / "references").iterdir()
    (folder / "zz.jsonl").write_bytes(case.given)
    check(outcome(lambda: use(store)), case.code, case.words)


def test_reference_errors_in_a_pipe_or_a_folder_are_left_out(store: Path) -> None:
    (folder,) = (store / "references").iterdir()
    os.mkfifo(folder / "a.jsonl")
    (folder / "b.jsonl").mkdir()
    check(outcome(lambda: use(store)), 0)


CASES = [*STORES, *REFERENCES]
