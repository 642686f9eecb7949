"""How the transformer is computed: its attention kernels, and whether its blocks are compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.model_source import quiet

Attention = Literal[
    "auto", "native", "native_cudnn", "native_efficient", "native_flash", "native_math", "flash", "flash_3", "xformers"
]

_PRIVATE = ("native_", "flash_3")
"""Names that diffusers writes with a leading underscore. Kernels that it would fetch from the Hub are left out: they
are other people's code, run unseen."""


@dataclass(frozen=True, slots=True)
class ComputeOptions:
    """What changes the speed of the transformer, and its results by no more than rounding."""

    compile: bool = False
    """Compile its repeated blocks with ``torch.compile`` when they are first used."""
    attention: Attention = "auto"
    """Which kernels compute attention; ``auto`` is ``native``, PyTorch's own choice."""


def prepare_transformer(module: Any, options: ComputeOptions) -> None:
    """Set the attention kernels and mark the blocks for compilation.

    Blocks are compiled one kind at a time (regional compilation), so that deep models compile as fast as shallow ones
    and the adapter's layers, which are added later, are compiled along.

    Raises:
        PrerequisiteError: the package of the kernels is not installed.
        UserError: the transformer's class names no repeated blocks.
    """
    # Also for `auto`: diffusers keeps the kernels that were set last for all models of the process.
    name = "native" if options.attention == "auto" else options.attention
    try:
        with quiet():  # diffusers warns, every time, that choosing kernels is experimental
            module.set_attention_backend(f"_{name}" if name.startswith(_PRIVATE) else name)
    except (RuntimeError, ImportError) as error:
        raise PrerequisiteError(
            f"model.attention {name} cannot be used here ({error}): install what it needs, or set model.attention=auto"
        ) from error
    if options.compile:
        try:
            module.compile_repeated_blocks()
        except ValueError as error:
            raise UserError(
                f"model.compile has no effect on this transformer ({type(module).__name__}), whose class names no"
                " repeated blocks: set it to false"
            ) from error
