"""Several evaluated runs side by side."""
