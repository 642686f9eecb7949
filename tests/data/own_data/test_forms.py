"""Every form of a table, as JSON: its prompts, images, scores and weights."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

from gdro_cli.data.own_data import OwnData, read_own_data
from gdro_cli.data.records import PromptRecord
from tests.support.own_data import all_scores, save_images, scores_of, write_table

KITE = "a red kite"
CAT = "a cat"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_images(tmp_path, *(f"images/{letter}.png" for letter in "abcd"))


def paths(letters: str) -> list[str]:
    return [f"images/{letter}.png" for letter in letters]


def read(folder: Path, *lines: dict[str, object]) -> OwnData:
    return read_own_data(write_table(folder / "data.jsonl", *lines))


def ranked(folder: Path, ranks: list[int], *, key: str = "ranks") -> list[float]:
    letters = "abcd"[: len(ranks)]
    (group,) = read(folder, {"prompt": KITE, "images": paths(letters), key: ranks}).groups
    return [image.scores["rank_score"] for image in group.images]


def test_scored_groups(folder: Path) -> None:
    data = read(
        folder,
        {"prompt": f" {KITE} ", "images": paths("ab"), "scores": [0.2, 1]},
        {"prompt": CAT, "images": paths("cd"), "scores": [-3, 4.5], "target": "CAT", "metadata": {"n": 1}, "weight": 2},
    )
    assert data.form == "scored groups"
    assert all_scores(data) == [
        (KITE, {"images/a.png": {"score": 0.2}, "images/b.png": {"score": 1.0}}),
        (CAT, {"images/c.png": {"score": -3.0}, "images/d.png": {"score": 4.5}}),
    ]
    assert [group.record for group in data.groups] == [
        PromptRecord.of(KITE),
        PromptRecord.of(CAT, target="CAT", metadata={"n": 1}),
    ]
    assert [group.weight for group in data.groups] == [1.0, 2.0]
    assert [group.where for group in data.groups] == ["data.jsonl line 1", "data.jsonl line 2"]
    assert data.notes == ()


def test_named_scores_and_missing_ones(folder: Path) -> None:
    scores = {"ocr": [0.25, None], "pickscore": [None, 21]}
    data = read(folder, {"prompt": KITE, "images": paths("ab"), "scores": scores})
    (group,) = data.groups
    assert scores_of(group) == {"images/a.png": {"ocr": 0.25}, "images/b.png": {"pickscore": 21.0}}
    assert data.score_names == ("ocr", "pickscore")
    assert "1 of 2 images have no score `ocr`" in data.notes


def test_one_line_per_image(folder: Path) -> None:
    data = read(
        folder,
        {"prompt": KITE, "image": "images/a.png", "score": 0.5},
        {"prompt": CAT, "image": "images/c.png", "score": 3},
        {"prompt": KITE, "image": "images/b.png", "score": None},
        {"prompt": KITE, "image": "images/c.png", "score": 1, "target": "KITE"},
    )
    assert data.form == "scored groups"
    assert all_scores(data) == [
        (KITE, {"images/a.png": {"score": 0.5}, "images/b.png": {}}),
        (CAT, {"images/c.png": {"score": 3.0}}),
        (KITE, {"images/c.png": {"score": 1.0}}),
    ]
    assert [group.where for group in data.groups] == ["data.jsonl line 1", "data.jsonl line 2", "data.jsonl line 4"]


def test_one_line_per_image_with_named_scores(folder: Path) -> None:
    data = read(
        folder,
        {"prompt": KITE, "image": "images/a.png", "scores": {"a": 0.2, "b": None}},
        {"prompt": KITE, "image": "images/b.png", "scores": {"a": 0.3, "b": 7}},
    )
    assert all_scores(data) == [(KITE, {"images/a.png": {"a": 0.2}, "images/b.png": {"a": 0.3, "b": 7.0}})]


def test_ranks_become_scores_from_one_to_zero(folder: Path) -> None:
    assert ranked(folder, [1, 3, 2]) == [1.0, 0.0, 0.5]
    assert ranked(folder, [4, 3, 2, 1]) == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("ranks", [[1, 2, 2, 3], [1, 2, 2, 4]])
def test_ties_share_the_mean_of_their_places(folder: Path, ranks: list[int]) -> None:
    assert ranked(folder, ranks) == pytest.approx([1, 0.5, 0.5, 0])
    assert ranked(folder, [1, 1, 1]) == [0.5, 0.5, 0.5]


def test_hpdv2_test_set(tmp_path: Path) -> None:
    """Its images are in a folder with the name of the file, and its ranks may count from 0."""
    save_images(tmp_path / "test", "1.jpg", "2.jpg", "3.jpg")
    entry = {"prompt": CAT, "image_path": ["1.jpg", "2.jpg", "3.jpg"], "rank": [2, 1, 3]}
    entry["raw_annotations"] = [{"rank": [2, 1, 3], "user_hash": "x"}]
    path = tmp_path / "test.json"
    path.write_text(json.dumps([entry, {**entry, "rank": [1, 0, 2]}]))
    data = read_own_data(path)
    assert data.form == "rankings"
    expected = {"test/1.jpg": {"rank_score": 0.5}, "test/2.jpg": {"rank_score": 1.0}, "test/3.jpg": {"rank_score": 0.0}}
    assert [scores for _, scores in all_scores(data)] == [expected, expected]
    assert [group.where for group in data.groups] == ["test.json entry 1", "test.json entry 2"]
    assert data.notes == ()


def test_hpdv2_training_set(tmp_path: Path) -> None:
    save_images(tmp_path / "train", "1.jpg", "2.jpg")
    entry = {"prompt": CAT, "file_path": ["1.jpg", "2.jpg"], "human_preference": [0, 1], "user_hash": "x"}
    path = tmp_path / "train.json"
    path.write_text(json.dumps([entry]))
    data = read_own_data(path)
    assert data.form == "pairs"
    assert all_scores(data) == [(CAT, {"train/1.jpg": {"preference": 0.0}, "train/2.jpg": {"preference": 1.0}})]
    assert data.notes == ()


def test_pairs(folder: Path) -> None:
    data = read(folder, {"prompt": KITE, "chosen": "images/b.png", "rejected": "images/a.png"})
    assert data.form == "pairs"
    assert all_scores(data) == [(KITE, {"images/b.png": {"preference": 1.0}, "images/a.png": {"preference": 0.0}})]


def test_ties_of_pairs_are_counted(folder: Path) -> None:
    pair = {"caption": KITE, "jpg_0": "images/a.png", "jpg_1": "images/b.png"}
    data = read(folder, {**pair, "label_0": 0, "label_1": 1.0}, {**pair, "label_0": 0.5, "label_1": 0.5})
    assert [list(scores.values()) for _, scores in all_scores(data)] == [
        [{"preference": 0.0}, {"preference": 1.0}],
        [{"preference": 0.5}, {"preference": 0.5}],
    ]
    assert data.notes == ("1 tie gives both images 0.5",)


def test_pick_a_pic_without_a_label_is_left_out(folder: Path) -> None:
    pair = {"caption": KITE, "jpg_0": "images/a.png", "jpg_1": "images/b.png", "user_id": 7}
    labelled = {**pair, "label_0": 1, "label_1": 0, "has_label": True}
    data = read(folder, labelled, {**pair, "label_0": 0, "label_1": 0, "has_label": False})
    assert len(data.groups) == 1
    assert data.notes == ("1 line has no preference (has_label) and was left out",)


def flow_factory(supervision: dict[str, object]) -> dict[str, object]:
    return {
        "schema_version": 2,
        "input": {"prompt": KITE, "media": []},
        "supervision": supervision,
        "metadata": {"license": "example"},
    }


def candidate(path: str) -> dict[str, object]:
    return {"media": [{"type": "image", "path": path}]}


def test_flow_factory_preferences(folder: Path) -> None:
    chosen, rejected = candidate("images/a.png"), candidate("images/b.png")
    data = read(folder, flow_factory({"type": "preference", "chosen": chosen, "rejected": rejected}))
    assert data.form == "pairs"
    assert all_scores(data) == [(KITE, {"images/a.png": {"preference": 1.0}, "images/b.png": {"preference": 0.0}})]
    assert data.groups[0].record == PromptRecord.of(KITE)
    assert data.notes == ()


def test_flow_factory_demonstrations(folder: Path) -> None:
    lines = [flow_factory({"type": "demonstration", "target": candidate(path)}) for path in paths("ab")]
    data = read(folder, *lines)
    assert data.form == "demonstrations"
    assert all_scores(data) == [(KITE, {"images/a.png": {}, "images/b.png": {}})]


def test_demonstrations(folder: Path) -> None:
    lines = [{"prompt": prompt, "image": path} for prompt, path in zip([KITE, CAT, KITE], paths("abc"), strict=True)]
    data = read(folder, *lines)
    assert data.form == "demonstrations"
    assert all_scores(data) == [(KITE, {"images/a.png": {}, "images/c.png": {}}), (CAT, {"images/b.png": {}})]
    assert data.score_names == ()
    listed = read(folder, {"prompt": KITE, "images": paths("ab")})
    assert (listed.form, all_scores(listed)) == ("demonstrations", [(KITE, {"images/a.png": {}, "images/b.png": {}})])


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_an_image_folder_of_datasets(folder: Path, key: str) -> None:
    write_table(folder / "metadata.jsonl", {"file_name": "images/a.png", key: KITE})
    data = read_own_data(folder)
    assert (data.form, all_scores(data)) == ("demonstrations", [(KITE, {"images/a.png": {}})])


def test_groups_with_the_same_prompt_stay_apart(folder: Path) -> None:
    group = {"prompt": KITE, "images": paths("ab"), "metadata": {"n": 1}}
    data = read(folder, *({**group, "scores": [0, score]} for score in (1, 2, 3)))
    assert [dict(group.record.metadata) for group in data.groups] == [
        {"n": 1},
        {"n": 1, "group": "2"},
        {"n": 1, "group": "3"},
    ]
    assert len({group.record.id for group in data.groups}) == 3


def test_repeated_lines_are_left_out(folder: Path) -> None:
    pair = {"prompt": KITE, "chosen": "images/a.png", "rejected": "images/b.png", "user": 1}
    data = read(folder, pair, dict(reversed(pair.items())), {**pair, "user": 2})
    assert len(data.groups) == 2
    assert "1 line repeats an earlier one and was left out" in data.notes


def test_ignored_keys_are_named_with_a_guess(folder: Path) -> None:
    group = {"prompt": KITE, "images": paths("ab"), "scores": [0, 1], "user": 3}
    data = read(folder, {**group, "wieght": 2}, {**group, "prompt": CAT})
    assert data.notes == (
        "keys that no form has were ignored: `user` in 2 lines, `wieght` in 1 line; did you mean `weight`?",
    )


def test_groups_without_spread_are_counted(folder: Path) -> None:
    flat = {"prompt": KITE, "images": paths("ab"), "scores": [1, 1]}
    assert read(folder, flat, {**flat, "prompt": CAT}).notes == (
        "no group has two different scores `score`, so a training cannot learn from it",
    )
    assert read(folder, flat, {**flat, "scores": [1, 2]}).notes == (
        "1 of 2 groups have no two different scores `score`; a training leaves them out",
    )


def test_blank_lines_marks_and_line_ends_change_nothing(folder: Path) -> None:
    line = json.dumps({"prompt": "“é”", "image": "images/a.png"}, ensure_ascii=False)
    path = folder / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"\r\n{line}\r\n\r\n".encode())
    (group,) = read_own_data(path).groups
    assert (group.record.prompt, group.where) == ("“é”", "data.jsonl line 2")


def test_a_json_file_may_have_an_object_per_line(folder: Path) -> None:
    path = write_table(folder / "data.json", {"prompt": KITE, "image": "images/a.png"})
    assert all_scores(read_own_data(path)) == [(KITE, {"images/a.png": {}})]


def test_an_absolute_path_inside_the_folder(folder: Path) -> None:
    data = read(folder, {"prompt": KITE, "images": [str(folder / "images/a.png"), "images/../images/b.png"]})
    assert [image.source.name for image in data.groups[0].images] == ["images/a.png", "images/b.png"]


def test_sources_read_the_file(folder: Path) -> None:
    data = read(folder, {"prompt": KITE, "image": "images/a.png"})
    source = data.groups[0].images[0].source
    raw = (folder / "images/a.png").read_bytes()
    assert (source.read(), source.size(), source.row, source.column) == (raw, len(raw), None, None)


def test_the_digest_depends_on_all_but_scores_and_content(folder: Path) -> None:
    line = {"prompt": KITE, "images": paths("ab"), "scores": [0, 1]}
    first = read(folder, line).digest
    assert read(folder, line).digest == first
    changes = [{"prompt": CAT}, {"images": paths("ac")}, {"weight": 2}, {"target": "A"}]
    assert first not in [read(folder, {**line, **change}).digest for change in changes]
    with (folder / "images/a.png").open("ab") as file:
        file.write(b"x")
    assert read(folder, {**line, "scores": [0, 2]}).digest == first


def test_edits_name_the_image_that_was_edited(folder: Path) -> None:
    """Only for a model that edits: elsewhere ``source`` may be anything."""
    rows = [
        {"prompt": KITE, "chosen": "images/a.png", "rejected": "images/b.png", "image": "images/c.png"},
        {"prompt": KITE, "chosen": "images/a.png", "rejected": "images/b.png", "source": "images/b.png"},
    ]
    data = read_own_data(write_table(folder / "data.jsonl", *rows), edits=True)
    assert [group.source.name for group in data.groups if group.source] == ["images/c.png", "images/b.png"]
    digests = [sha256((folder / name).read_bytes()).hexdigest() for name in ("images/c.png", "images/b.png")]
    assert [group.record.metadata for group in data.groups] == [{"image": digest} for digest in digests]
    assert read(folder, *(row | {"source": "a web page"} for row in rows)).groups[0].source is None

    given = {"prompt": KITE, "media": [{"type": "image", "path": "images/c.png"}]}
    target = {"type": "demonstration", "target": {"media": [{"type": "image", "path": "images/a.png"}]}}
    record = {"schema_version": 2, "input": given, "supervision": target}
    (group,) = read_own_data(write_table(folder / "data.jsonl", record), edits=True).groups
    assert group.source is not None and group.source.name == "images/c.png"
    assert group.images[0].source.name == "images/a.png"
