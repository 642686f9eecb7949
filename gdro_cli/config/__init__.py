"""Recipes: strict, documented YAML. Imports pydantic and PyYAML, never torch."""
