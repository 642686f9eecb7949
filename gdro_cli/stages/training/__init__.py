"""Stage ``train``: gradients from stored groups or fresh images, and the loop around them."""
