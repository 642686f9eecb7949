"""Optional packages warn at each start about what else of theirs cannot be loaded, which no job here uses."""

from __future__ import annotations

import logging

_TALKATIVE = ("bitsandbytes", "diffusers.quantizers.torchao", "torch.utils._pytree", "torchao")
"""Loggers whose warnings are about kernels and classes that nothing here uses."""


def silence_optional_packages() -> None:
    """Let these packages log errors only. Cheap: none of them is imported."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
