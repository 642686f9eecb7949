"""Errors that a user meets, each with its fixed exit code.

A message is one sentence: what is wrong, where, and what to do. The command line prints it without a traceback
(``--debug`` shows one) and exits with ``exit_code``.
"""

from __future__ import annotations


class GdroError(Exception):
    """Base of every error that the tool raises on purpose."""

    exit_code = 1


class UserError(GdroError):
    """A wrong command line, recipe or prompt file."""

    exit_code = 2


class PrerequisiteError(GdroError):
    """A prerequisite is missing: weights, a package, an endpoint."""

    exit_code = 3


class StoreError(GdroError):
    """A group store, score table, checkpoint or run folder is damaged or belongs to something else."""

    exit_code = 4


class Interrupted(GdroError):
    """Stopped by the user at a safe point; the message says how to continue."""

    exit_code = 130


class EndedElsewhere(GdroError):
    """Another process of the job ended early, so this one also ends.

    Args:
        message: empty if the other process has printed why.
        exit_code: the exit code of the other process.
    """

    def __init__(self, message: str = "", *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


_NO_MEMORY = ("out of memory", "can't allocate memory", "_STATUS_ALLOC_FAILED")
"""In messages of PyTorch, CUDA, NCCL, cuBLAS and cuDNN."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was not enough: Python's error, PyTorch's (known by its name), or a library's RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
