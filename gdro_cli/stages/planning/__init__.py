"""``--dry-run``: what a command would do and what it would need."""
