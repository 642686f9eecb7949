"""Wall times of the shards of a store or table, a line each in ``times.jsonl`` beside them.

They are told, not relied on: a missing or torn line makes the total unknown, and nothing else.
"""

from __future__ import annotations

from pathlib import Path

from gdro_cli.files import append_bytes, json_lines, parse_json

_FILE = "times.jsonl"


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
        for line in (folder / _FILE).read_text(encoding="utf-8").splitlines():
            row = parse_json(line)
            found[int(row["shard"])] = float(row["seconds"]) / int(row["processes"])
    except (OSError, ArithmeticError, ValueError, KeyError, TypeError):
        return None
    return sum(found.values()) if found.keys() >= set(range(shards)) else None
