"""Prompt files: text and JSON Lines, bad lines, and GenEval's metadata."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gdro_cli.config.sections import PromptSource
from gdro_cli.core.geneval import TAGS
from gdro_cli.data.promptfile import read_prompt_file
from gdro_cli.data.prompts import PromptSet, load_prompts
from gdro_cli.errors import UserError
from gdro_cli.rewards.base import Reward
from gdro_cli.rewards.geneval.reward import GenEvalReward
from tests.support.prompt_rewards import ANYTHING, COCO, OCR, SHAPES
from tests.support.rectangles import RectangleDetector


def load(
    path: Path, data: bytes | str, *, reward: Reward = OCR, count: int | None = None, skip_bad: bool = False
) -> PromptSet:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return load_prompts(PromptSource(file=str(path), count=count, skip_bad=skip_bad), reward=reward)


def refusal(path: Path, data: bytes | str) -> str:
    with pytest.raises(UserError) as caught:
        load(path, data)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_text_lines_as_flow_grpo_writes_them(tmp_path: Path) -> None:
    data = 'New York Skyline with "Hello World" written with fireworks\r\n\r\n  A cat holds “Go!”  \n'
    prompts = load(tmp_path / "train.txt", data)
    assert [(record.prompt, record.target) for record in prompts.records] == [
        ('New York Skyline with "Hello World" written with fireworks', "Hello World"),
        ("A cat holds “Go!”", "Go!"),
    ]


def test_a_plain_file_serves_a_reward_that_needs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('a red kite\n\na sign that says "HI"\n')
    records = read_prompt_file(path, reward=ANYTHING)
    assert [(record.prompt, record.target) for record in records] == [
        ("a red kite", None),
        ('a sign that says "HI"', None),
    ]


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_byte_order_mark_and_line_ends_change_nothing(tmp_path: Path, line_end: str) -> None:
    lines = ['a "ONE"', 'b "TWO"']
    plain = load(tmp_path / "a.txt", "\n".join(lines))
    other = load(tmp_path / "b.txt", b"\xef\xbb\xbf" + line_end.join(lines).encode() + line_end.encode())
    assert other == plain


def test_only_line_ends_separate_lines(tmp_path: Path) -> None:
    prompts = load(tmp_path / "p.txt", 'one line\u2028with "A"\tand a tab')
    assert [record.prompt for record in prompts.records] == ['one line\u2028with "A"\tand a tab']


def test_right_to_left_and_cjk_text(tmp_path: Path) -> None:
    prompts = load(tmp_path / "p.txt", 'שלט עם "שלום"\n看板に“こんにちは”と書いてある\n')
    assert [record.target for record in prompts.records] == ["שלום", "こんにちは"]


def test_json_lines(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a neon sign", "target": "OPEN", "source": "mine"},
        {"prompt": 'a sign "SHUT"'},
        {"prompt": 'a sign "SHUT"', "target": None},
    ]
    prompts = load(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    assert [(record.prompt, record.target, record.metadata) for record in prompts.records] == [
        ("a neon sign", "OPEN", {"source": "mine"}),
        ('a sign "SHUT"', "SHUT", {}),
    ]
    assert prompts.dropped_duplicates == 1


def test_count_takes_the_first_and_too_many_are_refused(tmp_path: Path) -> None:
    data = 'a "A"\na "A"\nb "B"\nc "C"\n'
    assert [record.target for record in load(tmp_path / "p.txt", data, count=2).records] == ["A", "B"]
    with pytest.raises(UserError, match="has 3 different prompts, fewer than the count 4: lower count"):
        load(tmp_path / "p.txt", data, count=4)


def test_lines_whose_target_is_doubtful_are_named_and_load_as_in_flow_grpo(tmp_path: Path) -> None:
    lines = ['a sign "A"', 'with "Any" "Text" written', 'A 24" monitor showing "HELLO"', "« OUI » and « NON »"]
    prompts = load(tmp_path / "p.txt", "\n".join(lines))
    assert [record.target for record in prompts.records] == ["A", "Any", " monitor showing ", " OUI "]
    assert prompts.remarks == (
        "prompts with several quoted texts, of which the first is the target: 2 (lines 2, 4)",
        "prompts with a double quote that has no partner: 1 (line 3: the target is ' monitor showing '); if that is not"
        " the text to write, name it as `target` in JSON Lines",
    )


def test_a_target_of_its_own_and_a_reward_without_one_need_no_remark(tmp_path: Path) -> None:
    row = json.dumps({"prompt": 'a 24" monitor showing "A" and "B"', "target": "A"})
    assert load(tmp_path / "p.jsonl", row).remarks == ()
    assert load(tmp_path / "p.txt", 'a 24" monitor showing "A" and "B"', reward=ANYTHING).remarks == ()


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_bad_lines_are_left_out_and_counted_on_request(tmp_path: Path, suffix: str) -> None:
    texts = ['a "A"', 'one " only', "no text", 'b "B"', 'a "A"', "none", "none"]
    lines = [text if suffix == ".txt" else json.dumps({"prompt": text}) for text in texts]
    data = "\n".join(lines).encode() + b"\n\xff"
    with pytest.raises(UserError, match="has 5 bad lines; line 2: it has no text in double quotes"):
        load(tmp_path / f"p{suffix}", data)
    prompts = load(tmp_path / f"p{suffix}", data, skip_bad=True)
    assert [record.target for record in prompts.records] == ["A", "B"]
    left_out, repeated = prompts.remarks
    assert left_out.startswith("bad lines left out: 5 (line 2: it has no text in double quotes; ")
    assert "line 6: " in left_out and left_out.endswith("; ...)")
    assert repeated == "prompts left out because they repeat earlier ones: 1"


def test_a_file_of_bad_lines_alone_is_refused_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 2 bad lines; line 1: it has no text"):
        load(tmp_path / "p.txt", "a\nb", skip_bad=True)


TEXT_CASES: dict[str, tuple[bytes | str, str]] = {
    "no quotes": ("a plain sign", "line 1: it has no text in double quotes"),
    "empty quotes": ('a sign ""', "line 1: the text that the image must say is empty"),
    "invisible text": ('a sign "\u200b\ufeff"', "line 1: the text that the image must say is empty"),
    "NUL": (b'ok "A"\na\x00b "C"', "line 2: the prompt contains the character U+0000"),
    "control character": ('a \x07 "C"', "line 1: the prompt contains the character U+0007"),
    "latin-1": (b'ok "A"\ncaf\xe9 "B"', "line 2: byte 4 is not UTF-8"),
    "utf-16": ('a "B"'.encode("utf-16"), "line 1: byte 1 is not UTF-8; save the file as UTF-8"),
    "10 MB line": (b'"' + b"x" * 10_000_000 + b'"', "line 1: the prompt has 10000002 characters"),
    "prompt too long": ('"A"' + "x" * 3998, "line 1: the prompt has 4001 characters"),
    "JSON in a text file": ('{"prompt": "a"}', "line 1: it looks like JSON; name the file .jsonl"),
    "empty": (b"", "has no prompts"),
    "only blank lines": (" \n\t\n\r\n", "has no prompts"),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\x00\x00", "bad lines"),
}


@pytest.mark.parametrize("case", TEXT_CASES)
def test_bad_text_files(tmp_path: Path, case: str) -> None:
    data, expected = TEXT_CASES[case]
    assert expected in refusal(tmp_path / "p.txt", data)


JSON_CASES = {
    "not JSON": ("prompt: a", "line 1: it is not JSON"),
    "a list": ('["a"]', "line 1: it is not a JSON object"),
    "no prompt": ('{"text": "a", "id": 1}', "line 1: the key prompt is missing; the keys are ['id', 'text']"),
    "no keys": ("{}", "line 1: the key prompt is missing; the keys are []"),
    "prompt is a number": ('{"prompt": 3}', "line 1: prompt must be a text, not int"),
    "prompt is empty": ('{"prompt": " ", "target": "A"}', "line 1: the prompt is empty"),
    "target is a list": ('{"prompt": "a", "target": ["A"]}', "line 1: target must be a text, not list"),
    "NaN": ('{"prompt": "a \\"A\\"", "x": NaN}', "line 1: its JSON cannot be used (NaN is not a JSON number)"),
    "half a surrogate pair": ('{"prompt": "a \\ud800 \\"A\\""}', "line 1: the prompt contains the character U+D800"),
    "escaped NUL": ('{"prompt": "a \\u0000 \\"A\\""}', "line 1: the prompt contains the character U+0000"),
}


@pytest.mark.parametrize("case", JSON_CASES)
def test_bad_json_files(tmp_path: Path, case: str) -> None:
    data, expected = JSON_CASES[case]
    assert expected in refusal(tmp_path / "p.jsonl", data)


DOG: dict[str, Any] = {"class": "dog", "count": 1}
CAT: dict[str, Any] = {"class": "cat", "count": 1}


def geneval(*include: Any, tag: Any = "two_object", **more: Any) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "prompt": "a photo of a thing", **more}


GENEVAL_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no metadata": ({"prompt": "a photo of a dog"}, "the key tag is missing"),
    "no include": ({"prompt": "a", "tag": "counting"}, "the key include is missing"),
    "tag is a number": (geneval(DOG, tag=3), "the tag 3 is not one of single_object, two_object"),
    "unknown tag": (geneval(DOG, tag="colours"), "the tag 'colours' is not one of"),
    "include is empty": (geneval(), "include must list at least one clause"),
    "exclude is a text": (geneval(DOG, exclude=""), "exclude must be a list of clauses, not str"),
    "no class": (geneval(DOG, {"count": 1}), "include[1] lacks the key class"),
    "unknown class": (
        geneval(DOG, CAT | {"class": "umbrela"}),
        "include[1] asks for the class 'umbrela', which the detector does not know; did you mean `umbrella`?",
    ),
    "unlike any class": (geneval(DOG | {"class": "qqq"}), "it knows 80 names such as 'person'"),
    "COCO's own name": (
        geneval(DOG | {"class": "mouse"}),
        "'mouse', which the detector does not know; GenEval calls it `computer mouse`",
    ),
    "another detector's class": (
        geneval(DOG | {"class": "star"}),
        "'star', which the detector does not know, but `reward.geneval.detector: shapes` does",
    ),
    "count 0": (geneval(DOG | {"count": 0}), "include[0] has the count 0; it must be a whole number, 1 or more"),
    "count is a part": (geneval(DOG | {"count": 1.5}), "include[0] has the count 1.5"),
    "bad colour": (geneval(DOG | {"color": "gray"}), "include[0] asks for the color 'gray', which is not one of red,"),
    "British colour": (geneval(DOG | {"colour": "red"}), "include[0] has the unknown key 'colour'"),
    "excluded colour": (geneval(DOG, exclude=[CAT | {"color": "red"}]), "exclude[0] has a color, which only include"),
    "excluded place": (geneval(DOG, exclude=[CAT | {"position": ["above", 0]}]), "exclude[0] has a position, which"),
    "no target": (geneval(DOG, CAT | {"position": ["above"]}), "include[1] has the position ['above']; write"),
    "bad relation": (geneval(DOG, CAT | {"position": ["on", 0]}), "include[1] has the relation 'on', which is not one"),
    "index out of range": (
        geneval(DOG, CAT | {"position": ["above", 2]}),
        "include[1] has a position relative to clause 2; it must be an earlier one, 0 to 0",
    ),
    "itself": (geneval(DOG, CAT | {"position": ["above", 1]}), "include[1] has a position relative to clause 1;"),
    "first clause": (geneval(DOG | {"position": ["above", 0]}), "relative to clause 0; the first clause can have none"),
}


@pytest.mark.parametrize("case", GENEVAL_CASES)
def test_bad_geneval_metadata(tmp_path: Path, case: str) -> None:
    row, expected = GENEVAL_CASES[case]
    path = tmp_path / "p.jsonl"
    path.write_text("\n" + json.dumps(row))
    with pytest.raises(UserError) as caught:
        read_prompt_file(path, reward=COCO)
    message = str(caught.value)
    assert message.startswith(f"the prompt file {path} has a bad line; line 2: ") and expected in message
    assert "\n" not in message and len(message) < 500


@pytest.mark.parametrize(("label", "known"), [("dog", ""), ("remote", " as `tv remote`")])
def test_a_class_of_coco_names_the_detector_that_has_it(tmp_path: Path, label: str, known: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(geneval(DOG | {"class": label})))
    words = f"'{label}', which the detector does not know, but `reward.geneval.detector: mask2former` does{known}"
    with pytest.raises(UserError, match=f"{words}$"):
        read_prompt_file(path, reward=SHAPES)


class GryphonDetector(RectangleDetector):
    """Has a class that the tool's own detectors do not have."""

    classes = ("gryphon",)


def test_prompts_may_name_the_classes_of_the_detector(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(geneval({"class": "gryphon", "count": 1})))
    assert len(read_prompt_file(path, reward=GenEvalReward(detector=GryphonDetector()))) == 1
    with pytest.raises(UserError, match="'gryphon', which the detector does not know: it knows circle, square, "):
        read_prompt_file(path, reward=SHAPES)


OFFICIAL_LINES = """\
{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
{"tag": "two_object", "include": [{"class": "bench", "count": 1}, {"class": "tv remote", "count": 1}], \
"prompt": "a photo of a bench and a tv remote"}
{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}], \
"prompt": "a photo of two clocks"}
{"tag": "colors", "include": [{"class": "car", "count": 1, "color": "pink"}], "prompt": "a photo of a pink car"}
{"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "teddy bear", "count": 1, \
"position": ["left of", 0]}], "prompt": "a photo of a teddy bear left of a dog"}
{"tag": "color_attr", "include": [{"class": "wine glass", "count": 1, "color": "purple"}, {"class": "apple", \
"count": 1, "color": "black"}], "prompt": "a photo of a purple wine glass and a black apple"}
"""
"""One line of each tag in the form that the official script writes; Flow-GRPO's metadata has the same form."""


def test_official_lines_of_every_tag_load_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text(OFFICIAL_LINES)
    records = read_prompt_file(path, reward=COCO)
    assert tuple(record.metadata["tag"] for record in records) == TAGS
    for record, line in zip(records, OFFICIAL_LINES.splitlines(), strict=True):
        assert {**record.metadata, "prompt": record.prompt} == json.loads(line)


def test_other_keys_are_kept_and_null_means_absent(tmp_path: Path) -> None:
    row = geneval(DOG | {"color": None, "position": None}, exclude=None, source="mine")
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row))
    (record,) = read_prompt_file(path, reward=COCO)
    assert {**record.metadata, "prompt": record.prompt} == row


def test_up_to_ten_bad_lines_are_listed_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path / "p.txt", "\n".join(["good “A”"] + ["bad"] * 12))
    assert "has 12 bad lines" in message
    assert "line 2:" in message and "line 11:" in message and "line 12:" not in message
    assert message.endswith("and 2 more")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for file, expected in [
        (str(tmp_path / "none.txt"), "No such file"),
        (str(tmp_path), "Is a directory"),
        ("x" * 5000, "File name too long"),
        ("~no-such-user/p.txt", "No such file"),
    ]:
        with pytest.raises(UserError, match=rf"cannot be read \({expected}.*\): check its name"):
            load_prompts(PromptSource(file=file), reward=OCR)


def test_a_file_without_read_permission(open_folder: Path, unprivileged: Callable[[], Any]) -> None:
    path = open_folder / "p.txt"
    path.write_text('"A"')
    path.chmod(0)
    with unprivileged(), pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        load_prompts(PromptSource(file=str(path)), reward=OCR)


def test_built_in_sets(tmp_path: Path) -> None:
    prompts = load_prompts(PromptSource(builtin="ocr-test", count=20, two_line_share=0.5), reward=OCR)
    assert len(prompts) == 20 and prompts.dropped_duplicates == 0
    assert all(record.target and f'"{record.target}"' in record.prompt for record in prompts.records)
    # A built-in prompt and the same line in a file are one record.
    again = load(tmp_path / "p.txt", "\n".join(record.prompt for record in prompts.records))
    assert again == prompts


@pytest.mark.parametrize(
    ("name", "reward", "hint"),
    [
        (
            "ocr-train",
            SHAPES,
            r"does not fit the reward geneval \(the key tag is missing; .*: choose one of geneval-train,",
        ),
        (
            "geneval-train",
            OCR,
            r"does not fit the reward ocr \(it has no text in double quotes; .*: choose one of ocr-",
        ),
    ],
)
def test_a_built_in_set_that_does_not_fit_the_reward(name: str, reward: Reward, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        load_prompts(PromptSource(builtin=name, count=3), reward=reward)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), suffix=st.sampled_from([".txt", ".jsonl"]))
def test_any_bytes_load_or_are_refused_in_one_sentence(tmp_path: Path, data: bytes, suffix: str) -> None:
    path = tmp_path / f"p{suffix}"
    try:
        prompts = load(path, data)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert all(record.target and record.target.strip() for record in prompts.records)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_CLAUSE = st.fixed_dictionaries(
    {},
    optional={
        "class": st.sampled_from(["dog", "cat", "dgo"]) | _JSON,
        "count": st.integers(-2, 4) | _JSON,
        "color": st.sampled_from(["red", "gold"]) | _JSON,
        "position": st.tuples(st.sampled_from(["above", "near"]), st.integers(-1, 2)) | _JSON,
    },
)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    metadata=st.fixed_dictionaries(
        {"prompt": st.text(max_size=8) | _JSON},
        optional={
            "tag": st.sampled_from(["position", "counting"]) | _JSON,
            "include": st.lists(_CLAUSE, max_size=3) | _JSON,
            "exclude": st.lists(_CLAUSE, max_size=2) | _JSON,
        },
    )
)
def test_any_metadata_loads_or_is_refused_in_one_sentence(tmp_path: Path, metadata: dict[str, Any]) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(metadata))
    try:
        read_prompt_file(path, reward=COCO)
    except UserError as error:
        assert str(path) in str(error)
