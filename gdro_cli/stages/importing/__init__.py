"""Stage ``import``: users' own images, scores and preferences become a group store and its score tables."""
