"""Stage ``eval``: base and trained model, measured and compared."""
