"""Optional packages tell at each start what else of theirs could not be loaded; a terminal is for the job at hand."""

from __future__ import annotations

import logging

_TALKATIVE = ("bitsandbytes", "diffusers.quantizers.torchao", "torch.utils._pytree", "torchao")
"""Loggers whose warnings are about kernels and classes that nothing here uses."""


def silence_optional_packages() -> None:
    """Leave them their errors. Cheap: none of them is imported."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
