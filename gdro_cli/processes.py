"""Other processes of this machine: whether one runs, and which GPU one may see."""

from __future__ import annotations

import os


def is_running(number: int) -> bool:
    """Whether a process has that number, as this process counts; one that is dead and not yet collected has.

    Outside POSIX, where asking would end it, any may.
    """
    if os.name != "posix":
        return True
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def only_gpu(index: int) -> str:
    """The value of ``CUDA_VISIBLE_DEVICES`` with which a process sees the GPU ``index`` of those of this process alone.

    Where this process sees no GPU of that number, neither will the other.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return str(index)
    names = [name.strip() for name in visible.split(",")]
    return names[index] if index < len(names) else visible
