"""Image folders in the official GenEval layout: written, read back, and as other tools write them."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from gdro_cli.data.imagefolder import PromptImages, metadata_line, read_image_folder, refuse_used, write_image_folder
from gdro_cli.data.promptfile import read_prompt_file
from gdro_cli.data.records import PromptRecord
from gdro_cli.data.sources import SourceImage
from gdro_cli.errors import StoreError, UserError
from gdro_cli.rewards.base import Reward
from tests.support.prompt_rewards import ANYTHING, COCO, OCR

DOG = {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}
CATS = {
    "tag": "counting",
    "include": [{"class": "cat", "count": 2}],
    "exclude": [{"class": "cat", "count": 3}],
    "source": "ünïcode \u2028",
}


def save_image(path: Path, grey: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(path)
    return path


def numbered(folder: Path, name: str, metadata: str | None, *images: str) -> Path:
    """Add a prompt's folder as another tool might write it."""
    for number, image in enumerate(images):
        save_image(folder / name / "samples" / image, number)
    (folder / name).mkdir(parents=True, exist_ok=True)
    if metadata is not None:
        (folder / name / "metadata.jsonl").write_text(metadata)
    return folder


def official(**changes: object) -> str:
    """A line as the official scripts write it, without a line end."""
    return json.dumps({**DOG, "prompt": "a photo of a dog"} | changes)


def refusal(folder: Path, reward: Reward = COCO) -> str:
    with pytest.raises(UserError) as caught:
        read_image_folder(folder, reward=reward)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_edit_is_written_with_its_source_and_read_back(tmp_path: Path) -> None:
    before = tmp_path / "before.png"
    for path, colour in ((before, "red"), (tmp_path / "after.png", "blue")):
        Image.new("RGB", (8, 6), colour).save(path)
    prompt = PromptRecord.of("make it blue", image=SourceImage(before, sha256(before.read_bytes()).hexdigest()))
    write_image_folder(tmp_path / "out", [PromptImages(prompt, (tmp_path / "after.png",))])
    assert json.loads((tmp_path / "out/00000/metadata.jsonl").read_text())["image"] == "source.png"
    (entry,) = read_image_folder(tmp_path / "out", reward=ANYTHING)
    assert entry.prompt.source is not None and entry.prompt.source.getcolors() == [(48, (255, 0, 0))]


def test_a_written_folder_is_read_back(tmp_path: Path) -> None:
    files = [save_image(tmp_path / f"source/{number}.png", number) for number in range(3)]
    entries = [
        PromptImages(PromptRecord.of("a photo of a dog", metadata=DOG), tuple(files[:2])),
        PromptImages(PromptRecord.of("a photo of two cats", metadata=CATS), (files[2],)),
    ]
    folder = tmp_path / "deep" / "export"
    write_image_folder(folder, entries)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "00000/metadata.jsonl",
        "00000/samples/0000.png",
        "00000/samples/0001.png",
        "00001/metadata.jsonl",
        "00001/samples/0000.png",
    ]
    read = read_image_folder(folder, reward=COCO)
    assert [entry.prompt for entry in read] == [entry.prompt for entry in entries]
    for before, after in zip(entries, read, strict=True):
        assert [path.read_bytes() for path in after.images] == [path.read_bytes() for path in before.images]


def test_an_ocr_prompt_keeps_a_target_that_is_not_in_its_quotes(tmp_path: Path) -> None:
    prompt = PromptRecord.of("a sign of a shop", target="OPEN", metadata={"set": 1})
    write_image_folder(tmp_path / "out", [PromptImages(prompt, (save_image(tmp_path / "p.png"),))])
    (entry,) = read_image_folder(tmp_path / "out", reward=OCR)
    assert entry.prompt == prompt


def test_images_of_a_webp_store_are_written_as_png(tmp_path: Path) -> None:
    """The official evaluator counts files named by digits with the ending png, and no others."""
    colours = Image.effect_mandelbrot((16, 8), (-2, -1, 1, 1), 50).convert("RGB")
    colours.save(tmp_path / "p.webp", lossless=True)
    prompt = PromptRecord.of("a photo of two cats", metadata=CATS)
    write_image_folder(tmp_path / "out", [PromptImages(prompt, (tmp_path / "p.webp", save_image(tmp_path / "q.png")))])
    written = sorted((tmp_path / "out" / "00000" / "samples").iterdir())
    assert [path.name for path in written] == ["0000.png", "0001.png"]
    with Image.open(written[0]) as image:
        assert image.format == "PNG" and image.tobytes() == colours.tobytes()


def test_a_damaged_image_is_not_exported(tmp_path: Path) -> None:
    (tmp_path / "p.webp").write_bytes(b"RIFF")
    entries = [PromptImages(PromptRecord.of("two cats", metadata=CATS), (tmp_path / "p.webp",))]
    with pytest.raises(StoreError, match=r"p\.webp cannot be exported"):
        write_image_folder(tmp_path / "out", entries)


def test_a_metadata_line_has_the_official_form_and_is_a_line_of_a_prompt_file(tmp_path: Path) -> None:
    line = metadata_line(PromptRecord.of("a photo of two cats", metadata=CATS))
    assert json.loads(line) == {**CATS, "prompt": "a photo of two cats"}
    (tmp_path / "all.jsonl").write_text(f"{line}\n{official()}\n")
    assert [r.prompt for r in read_prompt_file(tmp_path / "all.jsonl", reward=COCO)] == [
        "a photo of two cats",
        "a photo of a dog",
    ]


def test_folders_of_other_tools(tmp_path: Path) -> None:
    """Any number of digits, other formats and names, a grid beside the samples, and other or hidden files."""
    numbered(tmp_path, "7", official(), "00001.jpg", "00000.jpeg", "b.PNG", "._00000.jpg", "notes.txt.png")
    (tmp_path / "7" / "samples" / "seeds.json").write_text("[]")
    (tmp_path / "7" / "samples" / "folder.png").mkdir()
    save_image(tmp_path / "7" / "grid.png")
    numbered(tmp_path, "00012", official(prompt="a dog") + "\r\n\n", "0.webp")
    numbered(tmp_path, "results", "not JSON", "0.png")
    (tmp_path / "00013").write_text("a file")
    first, second = read_image_folder(tmp_path, reward=COCO)
    assert (first.prompt.prompt, [path.name for path in first.images]) == ("a dog", ["0.webp"])
    assert [path.name for path in second.images] == ["00000.jpeg", "00001.jpg", "b.PNG", "notes.txt.png"]
    assert first.left_out == () and [path.name for path in second.left_out] == ["folder.png", "seeds.json"]


def test_every_format_is_an_image_and_other_files_are_named(tmp_path: Path) -> None:
    numbered(tmp_path, "00000", official(), "0.bmp", "1.TIF", "2.avif", "3.gif")
    (tmp_path / "00000" / "samples" / "4.heic").touch()
    numbered(tmp_path, "00001", official(), "0.png")
    (tmp_path / "00001" / "samples" / "0.txt").touch()
    (entry,) = read_image_folder(tmp_path, reward=COCO)
    assert [path.name for path in entry.images] == ["0.bmp", "1.TIF", "2.avif", "3.gif", "0.png"]
    assert [path.name for path in entry.left_out] == ["4.heic", "0.txt"]


def test_folders_with_the_same_prompt_are_combined(tmp_path: Path) -> None:
    numbered(tmp_path, "00000", official(), "0000.png", "0001.png")
    numbered(tmp_path, "00001", official(prompt="another dog"), "0000.png")
    numbered(tmp_path, "00002", official(), "0000.png")
    read = read_image_folder(tmp_path, reward=COCO)
    assert [(entry.prompt.prompt, len(entry.images)) for entry in read] == [
        ("a photo of a dog", 3),
        ("another dog", 1),
    ]
    assert read[0].images[2] == tmp_path / "00002" / "samples" / "0000.png"


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("{", "it is not JSON"),
        (official(tag="colours"), "the tag 'colours' is not one of"),
        (official(include=[{"class": "dgo", "count": 1}]), "did you mean `dog`?"),
        ('{"prompt": "a dog"}', "the key tag is missing"),
    ],
)
def test_bad_metadata_names_file_and_line(tmp_path: Path, metadata: str, words: str) -> None:
    numbered(tmp_path, "00000", official(), "0000.png")
    numbered(tmp_path, "00001", f"\n{metadata}", "0000.png")
    message = refusal(tmp_path)
    assert str(tmp_path / "00001" / "metadata.jsonl") in message and "line 2: " in message and words in message


def test_the_missing_part_is_named(tmp_path: Path) -> None:
    assert "cannot be read (No such file or directory): check its name" in refusal(tmp_path / "nowhere")
    save_image(tmp_path / "flat" / "0000.png")
    assert f"{tmp_path / 'flat'} has no folders 00000" in refusal(tmp_path / "flat")
    assert "cannot be read (Not a directory)" in refusal(tmp_path / "flat" / "0000.png")
    message = refusal(numbered(tmp_path / "no metadata", "00000", None, "0000.png"))
    assert message.startswith(f"{tmp_path / 'no metadata' / '00000'} has no metadata.jsonl") and "recipe" not in message
    for samples in ("absent", "empty"):
        folder = numbered(tmp_path / samples, "00000", official())
        if samples == "empty":
            (folder / "00000" / "samples").mkdir()
        assert f"{folder / '00000' / 'samples'} has no images" in refusal(folder)
    folder = numbered(tmp_path / "two", "00000", official() + "\n" + official(prompt="a"), "0000.png")
    assert "metadata.jsonl has 2 prompts: it needs one line" in refusal(folder)
    (numbered(tmp_path / "link", "00000", official(), "0000.png") / "00000/samples/0001.png").symlink_to("nowhere.png")
    assert "0001.png is a broken link" in refusal(tmp_path / "link")
    assert "has no prompts" in refusal(numbered(tmp_path / "none", "00000", "\n", "0000.png"))


def test_a_folder_that_cannot_be_filled_is_refused(tmp_path: Path) -> None:
    file = save_image(tmp_path / "p.png")
    with pytest.raises(UserError, match="is not empty: name a new folder"):
        refuse_used(tmp_path)
    refuse_used(tmp_path / "missing" / "deep")
    (tmp_path / "empty").mkdir()
    refuse_used(tmp_path / "empty")
    (tmp_path / "loop").symlink_to("loop")
    for folder in (file, file / "out", file / "deep" / "out", tmp_path / "loop" / "out"):
        with pytest.raises(UserError, match=r"the images cannot be written to .* \(.*\): name another "):
            refuse_used(folder)
