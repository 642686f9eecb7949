"""Rewards of CLIP networks: similarity to the prompt, and what people prefer."""
