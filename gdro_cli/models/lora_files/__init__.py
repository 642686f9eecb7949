"""Adapter files: one form in memory, and a reader."""

from gdro_cli.models.lora_files.adapter import Adapter
from gdro_cli.models.lora_files.read import read_adapter

__all__ = ["Adapter", "read_adapter"]
