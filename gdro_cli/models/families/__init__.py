"""The families of models, one file each, and what those with 2 x 2 pixels in a token share."""
