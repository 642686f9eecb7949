"""Pages, charts, tables and image sheets."""
