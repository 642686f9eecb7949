"""Stage ``sample``: groups of images per prompt, made once."""
