"""``gdro export``: folders for others, and the Hub."""
