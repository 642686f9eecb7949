"""Wall times of the shards of a store or table, a line each in ``times.jsonl`` beside them.

They are told, not relied on: a missing or torn line makes the total unknown, and nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gdro_cli.files import append_bytes, json_lines, parse_json, read_bytes

_FILE = "times.jsonl"
_LONGEST = 1e10
"""Seconds that something can take: 300 years."""


def add_time(folder: Path, shard: int, seconds: float, *, processes: int = 1) -> None:
    """Note how long a shard took to make.

    Args:
        folder: of the store or table.
        shard: its number.
        seconds: wall time in the process that made it.
        processes: how many made shards side by side, so that their times overlap.

    Raises:
        StoreError: the file cannot be written.
    """
    append_bytes(folder / _FILE, json_lines([{"shard": shard, "seconds": seconds, "processes": processes}]))


def total_time(folder: Path, *, shards: int) -> float | None:
    """Seconds of wall time that all shards took; None where the time of one is not known."""
    found: dict[int, float] = {}
    try:
        for line in read_bytes(folder / _FILE).decode("utf-8").splitlines():
            row = parse_json(line)
            shard, seconds, processes = row["shard"], row["seconds"], row["processes"]
            if type(shard) is not int or not is_time(seconds) or type(processes) is not int or processes < 1:
                return None
            found[shard] = seconds / processes
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sum(found.values()) if found.keys() >= set(range(shards)) else None


def is_time(value: Any) -> bool:
    """Whether a value of a JSON file is a number of seconds."""
    return type(value) in (int, float) and 0 <= value <= _LONGEST
