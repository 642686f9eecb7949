"""Wall times of the shards of a store or table, a line each in ``times.jsonl`` beside them.

They are reported, not relied on: a missing or torn line makes the total unknown, and nothing else.
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
    try:
        rows = [parse_json(line) for line in (folder / _FILE).read_bytes().splitlines()]
        times = {int(row["shard"]): float(row["seconds"]) / row["processes"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sum(times.values()) if times.keys() >= set(range(shards)) else None
