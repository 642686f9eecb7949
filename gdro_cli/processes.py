"""Other processes of this machine, by their number."""

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
