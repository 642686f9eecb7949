"""Prompts, the group store, score tables, and the training set that is read from them."""
