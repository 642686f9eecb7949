"""``gdro export``: folders to share, and the Hub."""
