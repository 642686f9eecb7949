"""Prompts, a user's own images and scores, the group store, score tables, and the training set read from them."""
