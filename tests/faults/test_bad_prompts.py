"""Prompt files and GenEval metadata that are wrong: the sentence names the file, and the line where there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gdro_cli.config.sections import PromptSource
from gdro_cli.data.prompts import PromptSet, load_prompts
from tests.support.faulty import Case, check, never_unexpected, outcome, rows
from tests.support.prompt_rewards import REWARDS


def line(**values: Any) -> bytes:
    return json.dumps(values).encode()


GOOD = b'a sign that says "A"\n'
TEXT = [
    Case("nothing", b"", 2, "holds no prompts"),
    Case("one line end", b"\n", 2, "holds no prompts"),
    Case("a mark alone", b"\xef\xbb\xbf", 2, "holds no prompts"),
    Case("two marks", b"\xef\xbb\xbf\xef\xbb\xbf" + GOOD, 0),
    Case("CRLF", GOOD.replace(b"\n", b"\r\n"), 0),
    Case("CR alone", GOOD.replace(b"\n", b"\r"), 0),
    Case("no last line end", GOOD.strip(), 0),
    Case("duplicates", GOOD * 1000, 0),
    Case("Hebrew", 'שלט עם "שלום"\n'.encode(), 0),
    Case("Arabic with marks of direction", 'لافتة \u202b"مرحبا"\u202c\n'.encode(), 0),
    Case("Chinese", "写着“欢迎”的牌子\n".encode(), 0),
    Case("Japanese in its own quotes", "「歓迎」の看板\n".encode(), 2, "line 1: it has no text in double quotes"),
    Case("emoji with joiners", 'a "\N{WOMAN}\u200d\N{PERSONAL COMPUTER}"\n'.encode(), 0),
    Case("accents apart", 'a "e\u0301"\n'.encode(), 0),
    Case("UTF-16 LE", GOOD.decode().encode("utf-16"), 2, "UTF-16: save it as UTF-8"),
    Case("UTF-16 BE", b"\xfe\xff" + GOOD.decode().encode("utf-16-be"), 2, "UTF-16: save it as UTF-8"),
    Case("UTF-16 without a mark", GOOD.decode().encode("utf-16-le"), 2, "NUL"),
    Case("UTF-32", GOOD.decode().encode("utf-32"), 2, "UTF-8"),
    Case("Latin-1", GOOD + b'caf\xe9 "B"\n', 2, "line 2: byte 4 is not UTF-8"),
    Case("Shift-JIS", GOOD + "看板「あ」".encode("shift-jis"), 2, "line 2: byte 1 is not UTF-8"),
    Case("overlong UTF-8", b'a "\xc0\x80"\n', 2, "is not UTF-8"),
    Case("half a surrogate pair", b'a "\xed\xa0\x80"\n', 2, "is not UTF-8"),
    Case("NUL", GOOD + b'a "\x00"\n', 2, "line 2: it contains a NUL character"),
    Case("escape sequence", GOOD + b'\x1b[31m "A"\n', 2, "line 2: it contains the character U+001B"),
    Case("delete", b'a "\x7f"\n', 2, "U+007F"),
    Case("C1 control", 'a "\x85"\n'.encode(), 2, "U+0085"),
    Case("64 KiB line", b'"' + b"x" * 65_536, 2, "line 1: it has 65537 bytes"),
    Case("10 MB line", GOOD + b'"' + b"x" * 10_000_000 + b'"', 2, "line 2: it has 10000002 bytes"),
    Case("prompt of 4,001 characters", b'"A"' + b"x" * 3998, 2, "4001 characters"),
    Case("prompt of 4,000 characters", b'"A"' + b"x" * 3997, 0),
    Case("50,000 bad lines", b"bad\n" * 50_000, 2, "has 50000 bad lines"),
    Case("no quotes", GOOD + b"a sign\n", 2, "line 2: it has no text in double quotes"),
    Case("unclosed quote", b'a "sign\n', 2, "no text in double quotes"),
    Case("empty quotes", b'a ""\n', 2, "is empty"),
    Case("blank quotes", b'a " \t "\n', 2, "is empty"),
    Case("quotes of wide blanks", 'a "\u3000"\n'.encode(), 2, "is empty"),
    Case("an object", line(prompt='a "B"') + b"\n", 2, "name the file .jsonl"),
    Case("a picture", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", 2, "bad line"),
    Case("a zip", b"PK\x03\x04" + bytes(range(256)), 2, "bad line"),
    Case("random bytes", bytes((n * 37) % 256 for n in range(3000)), 2, "bad line"),
]
JSON = [
    Case("text", b"prompt: a\n", 2, "line 1: it is not JSON"),
    Case("a list", b'["a"]\n', 2, "it is not a JSON object"),
    Case("a number", b"3\n", 2, "it is not a JSON object"),
    Case("null", b"null\n", 2, "it is not a JSON object"),
    Case("one array for all", b"[\n" + line(prompt='a "A"') + b"\n]\n", 2, "it is not JSON"),
    Case("an object over lines", b'{\n"prompt": "a"\n}\n', 2, "it is not JSON"),
    Case("two objects on a line", line(prompt='"A"') * 2, 2, "it is not JSON"),
    Case("a comma after it", line(prompt='"A"') + b",", 2, "it is not JSON"),
    Case("cut off", line(prompt='"A"')[:-3], 2, "it is not JSON"),
    Case("no keys", b"{}", 2, "found no keys"),
    Case("other keys", line(text="a", id=1), 2, "found id, text"),
    Case("2,000 other keys", line(**{f"key{n}": n for n in range(2000)}), 2, "..."),
    Case("a key of 60 kB", line(**{"k" * 60_000: 1}), 2, "the key prompt is missing"),
    Case("a key with a line end", line(**{"a\nb": 1}), 2, "the key prompt is missing"),
    Case("prompt is a number", line(prompt=3), 2, "prompt must be a text, not int"),
    Case("prompt is null", line(prompt=None), 2, "prompt must be a text"),
    Case("prompt is a list", line(prompt=["a"]), 2, "prompt must be a text, not list"),
    Case("prompt is true", line(prompt=True), 2, "prompt must be a text, not bool"),
    Case("prompt is blank", line(prompt="\t", target="A"), 2, "the prompt is empty"),
    Case("target is a number", line(prompt="a", target=3), 2, "target must be a text"),
    Case("target is an object", line(prompt="a", target={}), 2, "target must be a text"),
    Case("target is blank", line(prompt="a", target=" "), 2, "is empty"),
    Case("prompt twice", b'{"prompt": "\\"A\\"", "prompt": "b"}', 2, "a key stands twice"),
    Case("deep key twice", b'{"prompt": "\\"A\\"", "x": {"y": 1, "y": 2}}', 2, "a key stands twice"),
    Case("NaN", b'{"prompt": "\\"A\\"", "x": NaN}', 2, "not a json number"),
    Case("infinity", b'{"prompt": "\\"A\\"", "x": -Infinity}', 2, "not a json number"),
    Case("a number beyond all", b'{"prompt": "\\"A\\"", "x": 1e999}', 2, "cannot be used"),
    Case("a number of 5,000 digits", b'{"prompt": "\\"A\\"", "x": ' + b"9" * 5000 + b"}", 2, "cannot be used"),
    Case("20,000 brackets", b'{"prompt": ' + b"[" * 20_000, 2, "nested too deeply"),
    Case("metadata 51 deep", b'{"prompt": "\\"A\\"", "n": ' + b"[" * 50 + b"]" * 50 + b"}", 2, "nested too deeply"),
    Case("metadata 900 deep", b'{"prompt": "\\"A\\"", "n": ' + b"[" * 899 + b"]" * 899 + b"}", 2, "nested too deeply"),
    Case("metadata 50 deep", b'{"prompt": "\\"A\\"", "n": ' + b"[" * 49 + b"]" * 49 + b"}", 0),
    Case("escaped NUL", b'{"prompt": "\\u0000 \\"A\\""}', 2, "NUL"),
    Case("escaped NUL in metadata", b'{"prompt": "\\"A\\"", "note": "a\\u0000b"}', 2, "its metadata contains a NUL"),
    Case("escape sequence in metadata", b'{"prompt": "\\"A\\"", "n": [{"\\u001b[0m": 1}]}', 2, "U+001B"),
    Case("half a surrogate pair escaped", b'{"prompt": "\\ud800 \\"A\\""}', 2, "U+D800"),
    Case("half a surrogate pair in the target", b'{"prompt": "a", "target": "\\udfff"}', 2, "U+DFFF"),
    Case("half a surrogate pair in metadata", b'{"prompt": "\\"A\\"", "n": "\\ud800"}', 2, "U+D800"),
    Case("a whole surrogate pair", b'{"prompt": "\\"\\ud83d\\ude00\\""}', 0),
    Case("mark and CRLF", b"\xef\xbb\xbf" + line(prompt='"A"') + b"\r\n\r\n", 0),
    Case("duplicates", (line(prompt='"A"') + b"\n") * 50, 0),
]


def demands(*clauses: Any, **changes: Any) -> bytes:
    return line(**({"prompt": "a photo", "tag": "position", "include": list(clauses)} | changes))


def clause(**changes: Any) -> dict[str, Any]:
    return {"class": "dog", "count": 1} | changes


GENEVAL = [
    Case("good", demands(clause(), clause(position=["left of", 0])), 0),
    Case("no tag", line(prompt="a", include=[clause()]), 2, "the key tag is missing"),
    Case("no include", line(prompt="a", tag="position"), 2, "the key include is missing"),
    Case("no prompt", line(tag="position", include=[clause()]), 2, "the key prompt is missing"),
    Case("unknown tag", demands(clause(), tag="colour"), 2, "the tag 'colour' is not one of"),
    Case("tag is a list", demands(clause(), tag=["position"]), 2, "is not one of"),
    Case("tag is null", demands(clause(), tag=None), 2, "is not one of"),
    Case("include is empty", demands(), 2, "at least one clause"),
    Case("include is null", demands(include=None), 2, "at least one clause"),
    Case("include is a section", demands(include=clause()), 2, "include must be a list of clauses"),
    Case("include is text", demands(include="dog"), 2, "include must be a list of clauses"),
    Case("clause is text", demands("dog"), 2, "include[0] must be an object"),
    Case("clause is a list", demands(clause(), ["dog", 1]), 2, "include[1] must be an object"),
    Case("clause is null", demands(None), 2, "include[0] must be an object"),
    Case("clause is empty", demands({}), 2, "include[0] lacks the key class"),
    Case("no count", demands({"class": "dog"}), 2, "include[0] lacks the key count"),
    Case("unknown class", demands(clause(**{"class": "dgo"})), 2, "did you mean `dog`?"),
    Case("class of another language", demands(clause(**{"class": "犬"})), 2, "which the detector does not know"),
    Case("class in capitals", demands(clause(**{"class": "DOG"})), 2, "which the detector does not know"),
    Case("class of 50 kB", demands(clause(**{"class": "d" * 50_000})), 2, "which the detector does not know"),
    Case("class is a number", demands(clause(**{"class": 17})), 2, "it must be a text"),
    Case("class is a list", demands(clause(**{"class": ["dog"]})), 2, "it must be a text"),
    Case("class is blank", demands(clause(**{"class": " "})), 2, "it must be a text that is not empty"),
    Case("count 0", demands(clause(count=0)), 2, "whole number, 1 or more"),
    Case("count below 0", demands(clause(count=-1)), 2, "whole number, 1 or more"),
    Case("count is half", demands(clause(count=1.5)), 2, "whole number, 1 or more"),
    Case("count 1.0", demands(clause(count=1.0)), 2, "whole number, 1 or more"),
    Case("count is text", demands(clause(count="1")), 2, "whole number, 1 or more"),
    Case("count is true", demands(clause(count=True)), 2, "whole number, 1 or more"),
    Case("count is null", demands(clause(count=None)), 2, "whole number, 1 or more"),
    Case("unknown colour", demands(clause(color="gold")), 2, "the color 'gold'"),
    Case("colour is a list", demands(clause(color=["red"])), 2, "not one of red"),
    Case("unknown key", demands(clause(size="big")), 2, "the unknown key 'size'"),
    Case("colour in British", demands(clause(colour="red")), 2, "the unknown key 'colour'"),
    Case("position of itself", demands(clause(position=["left of", 0])), 2, "the first clause can have none"),
    Case("position of a later one", demands(clause(), clause(position=["above", 2])), 2, "an earlier one, 0 to 0"),
    Case("position of a negative one", demands(clause(), clause(position=["above", -1])), 2, "an earlier one"),
    Case("position of a half one", demands(clause(), clause(position=["above", 0.0])), 2, "an earlier one"),
    Case("position of true", demands(clause(), clause(position=["above", False])), 2, "an earlier one"),
    Case("position of a name", demands(clause(), clause(position=["above", "dog"])), 2, "an earlier one"),
    Case("position is text", demands(clause(), clause(position="left of dog")), 2, "a relation and an earlier clause"),
    Case("position is too long", demands(clause(), clause(position=["above", 0, 1])), 2, "a relation and an earlier"),
    Case("unknown relation", demands(clause(), clause(position=["near", 0])), 2, "the relation 'near'"),
    Case("relation is a list", demands(clause(), clause(position=[["above"], 0])), 2, "is not one of left of"),
    Case("exclude is text", demands(clause(), exclude="dog"), 2, "exclude must be a list of clauses"),
    Case("exclude with a colour", demands(clause(), exclude=[clause(color="red")]), 2, "exclude[0] has a color"),
    Case("exclude with a position", demands(clause(), exclude=[clause(position=["above", 0])]), 2, "exclude[0]"),
    Case("exclude of an unknown class", demands(clause(), exclude=[clause(**{"class": "x"})]), 2, "exclude[0] asks"),
    Case("second line is bad", demands(clause()) + b"\n\n" + demands(clause(count=0)), 2, "line 3:"),
]


def load(path: Path, data: bytes, task: str) -> PromptSet:
    path.write_bytes(data)
    return load_prompts(PromptSource(file=str(path)), reward=REWARDS[task])


def check_file(case: Case, path: Path, task: str) -> None:
    found = outcome(lambda: load(path, case.given, task))
    check(found, case.code, case.words)
    if case.code:
        assert str(path) in found.message


@rows(TEXT)
def test_a_text_file(case: Case, tmp_path: Path) -> None:
    check_file(case, tmp_path / "prompts.txt", "ocr")


@rows(JSON)
def test_a_json_lines_file(case: Case, tmp_path: Path) -> None:
    check_file(case, tmp_path / "prompts.jsonl", "ocr")


@rows(GENEVAL)
def test_geneval_metadata(case: Case, tmp_path: Path) -> None:
    check_file(case, tmp_path / "metadata.jsonl", "geneval")


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
def test_any_metadata_loads_or_is_refused(tmp_path: Path, metadata: dict[str, Any]) -> None:
    found = never_unexpected(lambda: load(tmp_path / "m.jsonl", json.dumps(metadata).encode(), "geneval"), 2)
    assert not found.code or str(tmp_path / "m.jsonl") in found.message


CASES = [*TEXT, *JSON, *GENEVAL]
