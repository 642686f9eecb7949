"""Named random streams: a random number depends on what it is for, never on when it is drawn.

Each stream is named by (seed, purpose, keys), for example ``(0, "noise", "3fa9c0d1e2b4", 7)`` for image 7 of a prompt.
So batch size, order, restarts and the number of processes change nothing, and no global random state is used.
"""

from __future__ import annotations

import hashlib
import json

import torch


def seed_for(seed: int, purpose: str, *keys: str | int) -> int:
    """Return the 63-bit seed of a named stream.

    It is the first 8 bytes (big-endian, lowest bit dropped) of the SHA-256 of the JSON list
    ``[seed, purpose, [key, ...]]`` without spaces; the text ``"1"`` and the number ``1`` are different keys.

    Args:
        seed: the seed that the user chose, any integer.
        purpose: what the numbers are for, e.g. ``"noise"``.
        keys: what tells streams of one purpose apart, e.g. prompt id and image index.
    """
    name = json.dumps([seed, purpose, list(keys)], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(name.encode("ascii")).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *keys: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh torch generator for the named stream (see ``seed_for``).

    Generators on different devices give different numbers for one seed. Draw on the CPU what must not depend on the
    device.
    """
    return torch.Generator(device=device).manual_seed(seed_for(seed, purpose, *keys))
