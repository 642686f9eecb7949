"""Adapter files of this and other tools: one form in memory, a reader that knows a file by its keys, and writers."""

from gdro_cli.models.lora_files.adapter import Adapter
from gdro_cli.models.lora_files.read import read_adapter
from gdro_cli.models.lora_files.write import FORMATS, AdapterFile, Format, adapter_file

__all__ = ["FORMATS", "Adapter", "AdapterFile", "Format", "adapter_file", "read_adapter"]
