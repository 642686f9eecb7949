"""Prompts, the group store, score tables, and the training set read from them."""
