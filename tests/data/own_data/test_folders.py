"""Folders: which table they hold, GenEval's layout, and images with the prompt beside each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gdro_cli.data.own_data import read_own_data
from gdro_cli.data.records import PromptRecord
from tests.support.own_data import all_scores, image_bytes, refusal, save_images, write_parquet, write_table

DOG = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}


def geneval(folder: Path, number: str, prompt: str) -> None:
    save_images(folder / number / "samples", "0000.png", "0001.png")
    (folder / number / "metadata.jsonl").write_text(json.dumps({**DOG, "prompt": prompt}))


def beside(folder: Path, **prompts: str) -> Path:
    """An image for each name, with its prompt beside it."""
    save_images(folder, *(f"{name}.png" for name in prompts))
    for name, prompt in prompts.items():
        (folder / f"{name}.txt").write_text(f"{prompt}\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["data.jsonl", "metadata.jsonl"])
def test_a_folder_with_a_table(tmp_path: Path, name: str) -> None:
    beside(tmp_path, a="from the sidecar")
    write_table(tmp_path / name, {"prompt": "from the table", "image": "a.png"})
    data = read_own_data(tmp_path)
    assert (data.path, all_scores(data)) == (tmp_path, [("from the table", {"a.png": {}})])


def test_a_folder_with_two_tables(tmp_path: Path) -> None:
    save_images(tmp_path, "a.png")
    write_table(tmp_path / "data.jsonl", {"prompt": "a kite", "image": "a.png"})
    write_parquet(tmp_path / "x.parquet", {"prompt": ["a kite"], "image": [image_bytes()]})
    assert "has several tables (data.jsonl, x.parquet): name the file that you mean" in refusal(tmp_path)


def test_the_layout_of_geneval(tmp_path: Path) -> None:
    geneval(tmp_path, "00000", "a photo of a dog")
    geneval(tmp_path, "00001", "two dogs")
    data = read_own_data(tmp_path)
    assert data.form == "GenEval layout"
    assert all_scores(data) == [
        ("a photo of a dog", {"00000/samples/0000.png": {}, "00000/samples/0001.png": {}}),
        ("two dogs", {"00001/samples/0000.png": {}, "00001/samples/0001.png": {}}),
    ]
    assert data.groups[0].record == PromptRecord.of("a photo of a dog", metadata=DOG)
    assert [group.where for group in data.groups] == ["00000", "00001"]


def test_a_link_out_of_the_layout_of_geneval(tmp_path: Path) -> None:
    save_images(tmp_path, "outside.png")
    geneval(tmp_path / "data", "00000", "a dog")
    (tmp_path / "data/00000/samples/0002.png").symlink_to(tmp_path / "outside.png")
    assert "00000/samples/0002.png is outside the folder" in refusal(tmp_path / "data")


def test_prompts_beside_their_images(tmp_path: Path) -> None:
    beside(tmp_path, a="a kite", b="a “cat”", c="a kite")
    (tmp_path / "README.txt").write_text("about these images")
    data = read_own_data(tmp_path)
    assert data.form == "images with sidecar prompts"
    assert all_scores(data) == [("a kite", {"a.png": {}, "c.png": {}}), ("a “cat”", {"b.png": {}})]
    assert [group.where for group in data.groups] == ["a.png", "b.png"]
    assert data.notes == ("left out, what is neither an image nor its prompt: 1 (README.txt)",)


def test_what_is_not_imported_is_named(tmp_path: Path) -> None:
    """Images in folders of their own, of a format that is not read, and several captions of one image."""
    beside(tmp_path, a="a kite\n\na red kite", b="a cat")
    beside(tmp_path / "10_dogs", c="a dog")
    (tmp_path / "d.heic").write_bytes(b"ftypheic")
    assert read_own_data(tmp_path).notes == (
        "left out, what is neither an image nor its prompt: 1 (d.heic)",
        "left out, folders, which are imported one by one: 1 (10_dogs)",
        "prompts of several lines, each taken as one: 1 (a.txt)",
    )
    geneval(tmp_path / "images", "00000", "a dog")
    (tmp_path / "images/00000/samples/0002.heic").write_bytes(b"ftypheic")
    (note,) = read_own_data(tmp_path / "images").notes
    assert note == "left out, what is not an image: 1 (00000/samples/0002.heic)"


def test_images_without_a_prompt(tmp_path: Path) -> None:
    save_images(beside(tmp_path, a="a kite"), "b.png", "c.jpg")
    assert "has images without a prompt (2 of 3): write the prompt of b.png into b.txt, or write a table" in refusal(
        tmp_path
    )
    (tmp_path / "pairs.jsonl").write_text("")
    assert "into b.txt, or name its table, pairs.jsonl" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"), [(b" \n", "a.txt: the prompt is empty"), (b"\xff", "a.txt is not UTF-8 (byte 1)")]
)
def test_a_bad_prompt_beside_an_image(tmp_path: Path, content: bytes, said: str) -> None:
    beside(tmp_path, a="")
    (tmp_path / "a.txt").write_bytes(content)
    assert said in refusal(tmp_path)


def test_one_image_under_two_names(tmp_path: Path) -> None:
    beside(tmp_path, a="a kite")
    (tmp_path / "b.png").symlink_to("a.png")
    (tmp_path / "b.txt").write_text("a kite")
    assert "the image a.png appears twice in the group of a.png" in refusal(tmp_path)


def test_a_folder_with_nothing(tmp_path: Path) -> None:
    assert "has no table (data.jsonl, metadata.jsonl, *.parquet) and no images" in refusal(tmp_path)
    write_table(tmp_path / "train.jsonl", {"prompt": "a kite", "image": "a.png"})
    assert "name one of its files, train.jsonl" in refusal(tmp_path)
    beside(tmp_path / "folders" / "10_dogs", c="a dog")
    assert "name one of its folders, 10_dogs, or write a table" in refusal(tmp_path / "folders")
