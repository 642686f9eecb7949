"""Suggestions for misspelt names: did you mean ...?"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_SIMILAR = 0.6
"""The least similarity (difflib's ratio, 1 = equal) of a suggestion."""
_SIMILAR_ANYWHERE = 0.75
"""The same for a search of the whole recipe, where chance matches are likelier."""
_MOST = 3


def similar(given: str, names: Iterable[str]) -> str:
    """Return ``; did you mean `x`?`` with the most similar name, or an empty text if none is similar."""
    best = get_close_matches(given, list(names), n=1, cutoff=_SIMILAR)
    return f"; did you mean `{best[0]}`?" if best else ""


def similar_key(given: str, keys: Iterable[str]) -> str:
    """Return the same for a dotted key.

    First it looks for a similar name in the same section, then for the same name in another section (``method.tau`` for
    ``tau``), then for a similar name anywhere.
    """
    names = list(keys)
    section, _, leaf = given.rpartition(".")
    siblings = {_leaf(name): name for name in names if name.rpartition(".")[0] == section}
    best = [siblings[name] for name in get_close_matches(leaf, siblings, n=1, cutoff=_SIMILAR)]
    best = best or [name for name in names if _leaf(name) == leaf][:_MOST]
    if not best:
        leaves = {_leaf(name): name for name in reversed(names)}
        best = [leaves[name] for name in get_close_matches(leaf, leaves, n=1, cutoff=_SIMILAR_ANYWHERE)]
    return f"; did you mean {' or '.join(f'`{name}`' for name in best)}?" if best else ""


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
