"""A run or store that somebody else has prepared: links that lead out of it, and text that a terminal or a spreadsheet
would obey."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
import torch

from gdro_cli.cli.failures import exit_code_of
from gdro_cli.cli.tables import print_table
from gdro_cli.data.promptfile import read_prompt_file
from gdro_cli.data.scores import ScoreRow
from gdro_cli.data.shard_times import add_time
from gdro_cli.errors import StoreError, UserError
from gdro_cli.files import append_bytes, json_lines, parse_json, partial_name, write_bytes
from gdro_cli.runtime.checkpoint import save_checkpoint
from gdro_cli.runtime.progress import Reporter
from gdro_cli.runtime.run import RunFolder
from gdro_cli.runtime.terminal import printable
from gdro_cli.stages.reporting.csv_table import csv_bytes
from tests.support.prompt_rewards import OCR

PRECIOUS = b"precious\n"


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file of the user's, outside of every run and store."""
    path = tmp_path / "victim"
    path.write_bytes(PRECIOUS)
    return path


def test_a_file_is_never_written_through_a_link(victim: Path, tmp_path: Path) -> None:
    """The temporary name can be foreseen; what lies there is not what is written."""
    target = tmp_path / "run" / "README.md"
    target.parent.mkdir()
    partial_name(target).symlink_to(victim)
    write_bytes(target, b"card")
    assert victim.read_bytes() == PRECIOUS
    assert target.read_bytes() == b"card" and not target.is_symlink()
    assert [path.name for path in target.parent.iterdir()] == ["README.md"]


def test_nothing_is_added_through_a_link(victim: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "times.jsonl").symlink_to(victim)
    (store / "new.jsonl").symlink_to(tmp_path / "not there")
    for attempt in (lambda: add_time(store, 0, 1.0), lambda: append_bytes(store / "new.jsonl", b"row\n")):
        with pytest.raises(StoreError, match=r"cannot write .*jsonl: it is a link that leads elsewhere; delete it"):
            attempt()
    assert victim.read_bytes() == PRECIOUS and not (tmp_path / "not there").exists()


@pytest.mark.parametrize(
    "name", ["checkpoints", "best", "validation", "evaluations", "rounds", "metrics.jsonl", "best/checkpoints"]
)
def test_a_run_that_holds_a_link_is_not_worked_on(name: str, tmp_path: Path) -> None:
    """A checkpoint is written where the link leads, and older ones there are deleted: neither must happen."""
    about = {"recipe": {"name": "a"}, "inputs": {}, "environment": {}}
    run = RunFolder.create_or_open(tmp_path / "run", **about)
    outside = tmp_path / "outside"
    save_checkpoint(outside, 1, tensors={"adapter": {"w": torch.ones(1)}}, state={}, keep=1)
    link = run.path / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside / "checkpoints")
    with pytest.raises(StoreError, match=r"is a link that leaves its folder: delete it and run the command again"):
        RunFolder.create_or_open(tmp_path / "run", **about)
    assert [path.name for path in (outside / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize(
    "text", ["[1" + "0" * 400 + "]", "[" * 100_000, "[1e999]", '{"a": NaN}', "[18446744073709551616]"]
)
def test_numbers_and_depths_that_nothing_writes_are_no_json(text: str) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
    assert parse_json("[18446744073709551615, -3, 0.5]") == [2**64 - 1, -3, 0.5]


@pytest.mark.parametrize(
    "data",
    [
        '["\\ud800"]',
        '["\\uDFFF"]',
        '["\\ud83d \\ude00"]',
        '[{"\\udcff": 1}]',
        '["\ud800"]',
        b'["\xed\xa0\x80"]',
        '["\\ud800"]'.encode("utf-16"),
    ],
    ids=ascii,
)
def test_halves_of_characters_are_no_json(data: str | bytes) -> None:
    """They could be neither shown nor written."""
    with pytest.raises(ValueError):
        parse_json(data)


def test_whole_characters_are_json() -> None:
    for data in (r'["\ud83d\ude00"]', '["\U0001f600"]', b'["\xf0\x9f\x98\x80"]', '["\U0001f600"]'.encode("utf-16")):
        assert parse_json(data) == ["\U0001f600"]
    assert parse_json(r'["\\ud800"]') == [r"\ud800"]  # a backslash and letters


def test_a_score_s_reason_is_read_back_whatever_it_names() -> None:
    row = ScoreRow("a", 0, None, "the image x\udcff.png cannot be decoded")
    assert row.reason == r"the image x\udcff.png cannot be decoded"
    assert ScoreRow.from_json(parse_json(json_lines([row.to_json()]))) == row


def test_a_prompt_s_metadata_holds_no_larger_numbers(tmp_path: Path) -> None:
    """They would be refused where the store is read."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a \\"B\\"", "n": 18446744073709551616}\n')
    with pytest.raises(UserError, match="too large a number"):
        read_prompt_file(path, reward=OCR)


# -- terminal and spreadsheet -----------------------------------------------------------------------------------------

ESCAPES = "a\x1b]0;title\x07\x1b[2J\x9b31m\x7fb"


def test_a_terminal_obeys_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Title, clipboard and screen are the user's; tabs, ends of lines and all letters stay."""
    print_table(ESCAPES, [ESCAPES], [[ESCAPES]])
    Reporter().say(f"[red]{ESCAPES}[/] :bomb: \\")
    assert exit_code_of(UserError(ESCAPES), debug=False) == 2
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert not any((ord(letter) < 32 and letter not in "\t\n") or 127 <= ord(letter) < 160 for letter in text)
    assert "a\\x1b]0;title\\x07\\x1b[2J\\x9b31m\\x7fb" in said.out
    assert "[red]a" in said.err and ":bomb: \\\n" in said.err
    assert printable("ä\t\n日本 \u202e") == "ä\t\n日本 \u202e"


def test_a_spreadsheet_carries_out_no_text() -> None:
    """Texts that begin like a formula are marked as texts; numbers, also as texts, are not touched."""
    row = ["=HYPERLINK(1)", "@SUM(A1)", "-2+3", "+x", "\tx", "-0.5", "+1e5", -3, 0.5, None, True, "plain", "a=b", "-"]
    (read,) = csv.reader(io.StringIO(csv_bytes([row]).decode()))
    assert read[:5] == ["'=HYPERLINK(1)", "'@SUM(A1)", "'-2+3", "'+x", "'\tx"]
    assert read[5:] == ["-0.5", "+1e5", "-3", "0.5", "", "1", "plain", "a=b", "-"]
