"""gdro_cli: post-training of rectified-flow text-to-image models with Group-level Direct Reward Optimization."""

__version__ = "0.1.0"
