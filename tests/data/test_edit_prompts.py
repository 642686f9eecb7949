"""Prompt files whose prompts edit an image: what such a prompt is, and what is refused."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from gdro_cli.data.promptfile import read_prompt_file
from gdro_cli.data.prompts import PromptRecord, PromptSet
from gdro_cli.errors import UserError
from gdro_cli.rewards.base import Reward
from tests.support.prompt_rewards import ANYTHING


def edits(folder: Path, *lines: str) -> Path:
    """A prompt file beside two images, each line with more of the JSON."""
    folder.mkdir(exist_ok=True)
    for name, colour in (("cat.png", "red"), ("dog.png", "blue")):
        Image.new("RGB", (20, 10), colour).save(folder / name)
    path = folder / "edits.jsonl"
    path.write_text("".join(f'{{"prompt": "make it snow", {line}}}\n' for line in lines))
    return path


def test_a_prompt_is_its_text_and_the_content_of_its_image(tmp_path: Path) -> None:
    path = edits(tmp_path / "a", '"image": "cat.png"', '"image": "dog.png"', '"image": "./cat.png"')
    cat, dog, again = read_prompt_file(path, reward=ANYTHING)
    assert cat.metadata == {"image": sha256((tmp_path / "a" / "cat.png").read_bytes()).hexdigest()}
    assert cat == again and cat.id != dog.id and cat.source is not None and cat.source.size == (20, 10)
    assert PromptRecord.from_json(json.loads(json.dumps(cat.to_json()))) == cat

    (tmp_path / "a").rename(tmp_path / "b")
    moved = tmp_path / "b" / "edits.jsonl"
    assert [record.id for record in read_prompt_file(moved, reward=ANYTHING)] == [cat.id, dog.id, cat.id]
    Image.new("RGB", (20, 10), "green").save(tmp_path / "b" / "cat.png")
    changed, same, _ = read_prompt_file(moved, reward=ANYTHING)
    assert changed.id != cat.id and same.id == dog.id


def test_the_image_is_brought_to_the_size_of_the_job_by_cutting(tmp_path: Path) -> None:
    (record,) = read_prompt_file(edits(tmp_path, '"image": "cat.png"'), reward=ANYTHING)
    halves = Image.new("RGB", (40, 10), "red")
    halves.paste("blue", (0, 0, 10, 10))
    halves.save(tmp_path / "cat.png")
    (record,) = PromptSet.of(read_prompt_file(tmp_path / "edits.jsonl", reward=ANYTHING)).at_size(10, 20).records
    assert record.source is not None and record.source.size == (20, 10)
    assert record.source.getcolors() == [(200, (255, 0, 0))]  # the middle: the blue quarter is cut off
    halves.rotate(180).save(tmp_path / "cat.png")
    with pytest.raises(UserError, match="has changed since its prompt was read: run the command again"):
        record.source  # noqa: B018


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('"image": "cow.png"', "the image cow.png is missing; paths are relative to "),
        ('"image": "../x.png"', "the image ../x.png is outside the folder "),
        ('"image": "edits.jsonl"', "the image edits.jsonl cannot be used: it is not an image of a format that is read"),
        ('"image": ["a.png", "b.png"]', "image is a list, and a prompt edits one image: name the path of one (docs/"),
        ('"image": 3', "image must be the path of the image to edit, not 3"),
        ('"image": ""', "image must be the path of the image to edit, not ''"),
    ],
)
def test_an_image_that_cannot_be_used_is_named_with_its_line(tmp_path: Path, line: str, reason: str) -> None:
    path = edits(tmp_path, '"image": "cat.png"', line)
    with pytest.raises(UserError, match=re.escape(f"the prompt file {path} has a bad line; line 2: {reason}")):
        read_prompt_file(path, reward=ANYTHING)


def test_a_reward_can_need_an_image(tmp_path: Path) -> None:
    class Likeness(Reward):
        name, purpose, needs, version = "likeness", "to keep the image", frozenset({"image"}), {"rule": "1"}

    path = edits(tmp_path, '"image": "cat.png"', '"image": null')
    with pytest.raises(UserError, match="line 2: the key image is missing"):
        read_prompt_file(path, reward=Likeness())
