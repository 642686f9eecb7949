"""Stage ``score``: the reward of every stored image."""
