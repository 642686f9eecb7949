"""Tables with mistakes: one sentence each, with the file and the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gdro_cli.data.own_data import read_own_data
from gdro_cli.data.own_data.jsonl import MAX_LINE_BYTES
from gdro_cli.errors import UserError
from tests.support.own_data import refusal, save_images, write_table

GROUP = {"prompt": "a kite", "images": ["a.png", "b.png"], "scores": [0.1, 0.2]}
PER_IMAGE = {"prompt": "a kite", "image": "a.png", "score": 0.1}
RANKS = {"prompt": "a kite", "images": ["a.png", "b.png"], "ranks": [1, 2]}
PAIR = {"prompt": "a kite", "chosen": "a.png", "rejected": "b.png"}
LABELS = {"prompt": "a kite", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 1, "label_1": 0}
HPD = {"prompt": "a kite", "file_path": ["a.png", "b.png"], "human_preference": [1, 0]}
FLOW = {
    "schema_version": 2,
    "input": {"prompt": "a kite", "media": []},
    "supervision": {"type": "demonstration", "target": {"media": [{"type": "image", "path": "a.png"}]}},
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    save_images(tmp_path / "data", "a.png", "b.png")
    save_images(tmp_path, "outside.png")
    return tmp_path / "data" / "data.jsonl"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({**GROUP, "images": ["a.png", "c.png"]}, "the image c.png is missing; paths are relative to"),
        ({**GROUP, "images": ["a.png", "../outside.png"]}, "the image ../outside.png is outside the folder"),
        ({**GROUP, "images": ["a.png", "/etc/hostname"]}, "the image /etc/hostname is outside the folder"),
        ({**GROUP, "images": ["a.png", "b\0.png"]}, "the path of an image contains the character U+0000"),
        ({**GROUP, "images": ["a.png", "b\ud800.png"]}, "the path of an image contains the character U+D800"),
        ({**GROUP, "images": ["a.png", 3]}, "an image must be a path, not 3"),
        ({**GROUP, "images": ["a.png", "./a.png"]}, "the image a.png appears twice in the group of"),
        ({**GROUP, "images": []}, "images must be a list of images, not an empty one"),
        ({**GROUP, "images": "a.png"}, "images must be a list of images, not a text"),
        ({**GROUP, "scores": [0.1]}, "images has 2 entries and scores has 1; they must be as many"),
        ({**GROUP, "scores": {"ocr": [0.1, 0.2, 0.3]}}, "images has 2 entries and scores.ocr has 3"),
        ({**GROUP, "scores": {}}, "scores is empty"),
        ({**GROUP, "scores": {"": [1, 2]}}, "'' is not a name for a score"),
        ({**GROUP, "scores": 0.5}, "scores must be a list with a number for each image, not a number"),
        ({**GROUP, "scores": [0.1, "0.2"]}, "scores must be a finite number, not '0.2'"),
        ({**GROUP, "scores": [0.1, True]}, "scores must be a finite number, not True"),
        ({**GROUP, "scores": [0.1, 10**400]}, "scores must be a finite number, not 1000"),
        ({**GROUP, "prompt": "  "}, "the prompt is empty"),
        ({**GROUP, "prompt": 7}, "prompt must be a text, not a number"),
        ({**GROUP, "prompt": "a\x07"}, "the prompt contains the character U+0007"),
        ({**GROUP, "prompt": "a" * 4001}, "the prompt has 4001 characters"),
        ({**GROUP, "target": 7}, "target must be a text, not a number"),
        ({**GROUP, "metadata": "x"}, "metadata must be an object, not a text"),
        ({**GROUP, "weight": 0}, "weight must be above 0, not 0"),
        ({**GROUP, "weight": "2"}, "weight must be a finite number, not '2'"),
        ({**PER_IMAGE, "image": ["a.png"]}, "image must be one image, not a list"),
        ({**PER_IMAGE, "score": "high"}, "score must be a finite number, not 'high'"),
        ({**RANKS, "ranks": [1, 3]}, "ranks must be whole numbers from 1 (the best) to 2, not [1, 3]"),
        ({**RANKS, "ranks": [0, 1]}, "ranks must be whole numbers from 1 (the best) to 2, not [0, 1]"),
        ({**RANKS, "ranks": [2, 2]}, "ranks must be whole numbers from 1 (the best) to 2, not [2, 2]"),
        ({**RANKS, "ranks": [1, 1.5]}, "ranks must be whole numbers from 1 (the best) to 2, not [1, 1.5]"),
        ({**RANKS, "ranks": [1]}, "images has 2 entries and ranks has 1"),
        ({**RANKS, "images": ["a.png"], "ranks": [1]}, "a ranking needs two images or more"),
        ({**PAIR, "rejected": None}, "rejected must be one image, not null"),
        ({**PAIR, "rejected": "a.png"}, "the image a.png appears twice"),
        ({**LABELS, "label_0": 0.7}, "label_0 and label_1 must be 1 and 0, 0 and 1, or 0.5 and 0.5, not [0.7, 0.0]"),
        ({**LABELS, "label_1": 1}, "label_0 and label_1 must be 1 and 0, 0 and 1, or 0.5 and 0.5, not [1.0, 1.0]"),
        ({**HPD, "human_preference": [1, 1]}, "human_preference[0] and human_preference[1] must be 1 and 0"),
        ({**HPD, "file_path": ["a.png"], "human_preference": [1]}, "file_path must have two images, not 1"),
        ({**FLOW, "schema_version": 3}, "its schema_version is 3; 2 is the one that can be read"),
        ({**FLOW, "input": {"prompt": "a", "media": [{"type": "image", "path": "a.png"}]}}, "more than a prompt"),
        ({**FLOW, "input": {"prompt": "a", "negative_prompt": "b"}}, "its input has more than a prompt"),
        ({**FLOW, "supervision": {"type": "video"}}, "its supervision.type is 'video'"),
        ({**FLOW, "supervision": {"type": ["video"]}}, "its supervision.type is ['video']"),
        ({**FLOW, "supervision": {"type": "preference"}}, "supervision.chosen must be an object, not null"),
        (
            {**FLOW, "supervision": {"type": "demonstration", "target": {"media": [{"type": "video", "path": "a"}]}}},
            "supervision.target.media must have one entry, of the type image",
        ),
        ("{nonsense", "is not JSON (expecting property name enclosed in double quotes at character 2)"),
        ('{"prompt": "a", "image": "a.png", "score": NaN}', "NaN is not a JSON number"),
        ('{"prompt": "a", "image": "a.png", "score": -Infinity}', "-Infinity is not a JSON number"),
        ('{"prompt": "a", "image": "a.png", "score": 1e999}', "score must be a finite number, not inf"),
        ("[1, 2]", 'is not a JSON object: write one {"prompt": ...} per line'),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line(table: Path, line: dict[str, Any] | str, said: str) -> None:
    write_table(table, "", line)
    message = refusal(table)
    assert said in message
    assert f"{table} line 2" in message


def test_a_line_that_is_not_utf8(table: Path) -> None:
    table.write_bytes(b'{"prompt": "\xff"}\n')
    assert "line 1 is not UTF-8 (byte 13): save the file as UTF-8" in refusal(table)


def test_a_line_that_is_too_long(table: Path) -> None:
    good = json.dumps(PER_IMAGE)
    write_table(table, good + " " * (MAX_LINE_BYTES - len(good) - 1))
    assert len(read_own_data(table).groups) == 1
    write_table(table, good, " " * MAX_LINE_BYTES)
    assert f"{table} line 2 is longer than 10 MB" in refusal(table)


def test_several_bad_lines_come_at_once(table: Path) -> None:
    write_table(table, *({**PER_IMAGE, "image": f"{number}.png"} for number in range(12)), PER_IMAGE)
    message = refusal(table)
    assert message.startswith(f"{table} has 12 bad lines; data.jsonl line 1: the image 0.png is missing")
    assert "line 10: the image 9.png is missing" in message and "10.png" not in message
    assert message.endswith("; and 2 more")


@pytest.mark.parametrize("data", ["", "\n \n"])
def test_an_empty_table(table: Path, data: str) -> None:
    table.write_text(data)
    assert "has no data: write one prompt with its images per line" in refusal(table)


def test_a_table_where_nobody_has_chosen(table: Path) -> None:
    write_table(table, {**LABELS, "has_label": False})
    assert "has no data" in refusal(table)


def test_unknown_keys(table: Path) -> None:
    write_table(table, {"prompt": "a kite", "pictures": ["a.png"], "scores": [1]})
    message = refusal(table)
    assert f"{table} line 1: its keys (prompt, pictures, scores) fit no form" in message
    for form in ("scored groups (prompt, images, scores)", "pairs (prompt, chosen, rejected)", "docs/own-data.md"):
        assert form in message
    write_table(table, {"promt": "a kite", "image": "a.png"})
    assert "fit no form; did you mean `prompt`? the forms are scored groups" in refusal(table)
    write_table(table, {**{key: LABELS[key] for key in LABELS if key != "label_0"}, "label_o": 1, "has_label": True})
    assert "fit no form; did you mean `label_0`? the forms" in refusal(table)


def test_mixed_forms(table: Path) -> None:
    write_table(table, GROUP, PAIR)
    assert (
        f"{table} line 2 has pairs (prompt, chosen, rejected), and data.jsonl line 1 has scored groups (prompt, images,"
        " scores): write all lines alike, with null for a missing score"
    ) in refusal(table)


def test_an_image_twice_in_a_group_over_several_lines(table: Path) -> None:
    write_table(table, PER_IMAGE, {**PER_IMAGE, "score": 0.4})
    message = refusal(table)
    assert f"{table} line 2: the image a.png appears twice in the group of data.jsonl line 1" in message


def test_a_group_with_two_weights(table: Path) -> None:
    write_table(table, {**PER_IMAGE, "weight": 2}, {**PER_IMAGE, "image": "b.png"})
    assert "line 2: weight is 1, and 2 in data.jsonl line 1; a group has one weight" in refusal(table)


def test_a_used_group_key(table: Path) -> None:
    group = {**GROUP, "metadata": {"group": "left"}}
    write_table(table, group, {**group, "scores": [1, 2]})
    assert "line 2: an earlier group has the same prompt, and metadata group is in use; change it" in refusal(table)


def test_a_link_that_leads_out(table: Path) -> None:
    (table.parent / "c.png").symlink_to(table.parents[1] / "outside.png")
    write_table(table, {**PER_IMAGE, "image": "c.png"})
    assert "the image c.png is outside the folder" in refusal(table)


def test_a_file_of_another_kind(table: Path) -> None:
    path = table.with_suffix(".csv")
    path.write_text("prompt,image\n")
    assert "its name must end in .jsonl, .ndjson, .json or .parquet" in refusal(path)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    assert "does not exist: name a table or a folder of images" in refusal(tmp_path / "none.jsonl")


def test_a_bad_entry_of_an_array(table: Path) -> None:
    path = table.with_suffix(".json")
    path.write_text(json.dumps([PER_IMAGE, {**PER_IMAGE, "image": "c.png"}]))
    assert f"{path} entry 2: the image c.png is missing" in refusal(path)
    path.write_text(json.dumps([PER_IMAGE, 3]))
    assert f"{path} entry 2 is not a JSON object" in refusal(path)


def test_an_image_that_goes_after_the_reading(table: Path) -> None:
    write_table(table, PER_IMAGE)
    source = read_own_data(table).groups[0].images[0].source
    (table.parent / "a.png").unlink()
    with pytest.raises(UserError, match=r"the image a\.png cannot be read \(No such file or directory\)"):
        source.read()
    with pytest.raises(UserError, match=r"the image a\.png cannot be read"):
        source.size()
