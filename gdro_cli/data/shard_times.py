"""Wall times of the shards of a store or table, one line each in ``times.jsonl`` beside them.

They are only reported: if a line is missing or damaged, the total is unknown.
"""

from __future__ import annotations

from pathlib import Path

from gdro_cli.files import append_bytes, json_lines, parse_json

_FILE = "times.jsonl"


def add_time(folder: Path, shard: int, seconds: float, *, processes: int = 1) -> None:
    """Record how long a shard took.

    Args:
        folder: of the store or table.
        shard: number of the shard.
        seconds: wall time in the process that made the shard.
        processes: number of processes that made shards in parallel, so that their times overlap.

    Raises:
        StoreError: the file cannot be written.
    """
    append_bytes(folder / _FILE, json_lines([{"shard": shard, "seconds": seconds, "processes": processes}]))


def total_time(folder: Path, *, shards: int) -> float | None:
    """Seconds of wall time for all shards; None if the time of one is unknown."""
    try:
        rows = [parse_json(line) for line in (folder / _FILE).read_bytes().splitlines()]
        times = {int(row["shard"]): float(row["seconds"]) / row["processes"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sum(times.values()) if times.keys() >= set(range(shards)) else None
