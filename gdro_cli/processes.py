"""Which GPU another process of this machine sees."""

from __future__ import annotations

import os


def only_gpu(index: int) -> str:
    """Return the ``CUDA_VISIBLE_DEVICES`` that shows another process only GPU ``index`` of those this process sees.

    If this process sees no GPU of that index, the value does not change.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(index)
    names = [name.strip() for name in visible.split(",")]
    return names[index] if index < len(names) else visible
