"""Which GPU another process of this machine may see."""

from __future__ import annotations

import os


def only_gpu(index: int) -> str:
    """The value of ``CUDA_VISIBLE_DEVICES`` with which a process sees the GPU ``index`` of those of this process alone.

    Where this process sees no GPU of that number, neither will the other.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(index)
    names = [name.strip() for name in visible.split(",")]
    return names[index] if index < len(names) else visible
