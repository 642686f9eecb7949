"""``gdro ablate``: one training per value of a swept key."""
