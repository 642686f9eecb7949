"""A training run on disk: its name, weights, results and times."""
