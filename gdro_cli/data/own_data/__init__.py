"""Images, scores and preferences that a user brings: tables and folders of several forms, read into one form.

``read`` finds out what a path holds; ``jsonl``, ``parquet`` and ``folder`` read it; ``lines`` knows the keys of a
line; ``groups`` has the one form. Images are not decoded here.
"""

from gdro_cli.data.own_data.groups import ImageSource, OwnData, OwnGroup, OwnImage
from gdro_cli.data.own_data.read import read_own_data
from gdro_cli.data.own_data.scorefile import read_score_file

__all__ = ["ImageSource", "OwnData", "OwnGroup", "OwnImage", "read_own_data", "read_score_file"]
