"""How the transformer is computed: its attention kernels, and whether its blocks are compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from gdro_cli.errors import PrerequisiteError, UserError
from gdro_cli.model_source import quiet

Attention = Literal[
    "auto", "native", "native_cudnn", "native_efficient", "native_flash", "native_math", "flash", "flash_3", "xformers"
]

_PRIVATE = ("native_", "flash_3")
"""Names that diffusers writes with a leading underscore. Kernels that it would fetch from the Hub are left out, because
they are unreviewed code."""


@dataclass(frozen=True, slots=True)
class ComputeOptions:
    """Options that change the speed of the transformer, and its results only by rounding."""

    compile: bool = False
    """Compile the repeated blocks with ``torch.compile`` at their first use."""
    attention: Attention = "auto"
    """The kernels that compute attention; ``auto`` is ``native``, PyTorch's own choice."""


def prepare_transformer(module: Any, options: ComputeOptions) -> None:
    """Set the attention kernels and mark the blocks for compilation.

    Each kind of block is compiled once (regional compilation), so a deep model compiles as fast as a shallow one. The
    adapter's layers, added later, are compiled with their blocks.

    Raises:
        PrerequisiteError: the package of the kernels is not installed.
        UserError: an option has no effect on the transformer's class.
    """
    # Also for `auto`: diffusers applies the kernels that were set last to all models of the process.
    name = "native" if options.attention == "auto" else options.attention
    try:
        with quiet():  # diffusers warns each time that choosing kernels is experimental
            module.set_attention_backend(f"_{name}" if name.startswith(_PRIVATE) else name)
    except (RuntimeError, ImportError) as error:
        raise PrerequisiteError(
            f"model.attention {name} cannot be used here ({error}): install what it needs, or set model.attention=auto"
        ) from error
    if options.attention != "auto":
        _refuse_if_ignored(module)
        if not name.startswith("native"):
            _keep_dtype_of_queries_and_keys(module)
    if options.compile:
        # A job runs a block with and without gradient, autocast and adapter, at several batch sizes. Versions beyond
        # dynamo's own limit of 8 would run uncompiled.
        from torch._dynamo import config

        config.recompile_limit = max(config.recompile_limit, 64)
        try:
            module.compile_repeated_blocks()
        except ValueError as error:
            raise UserError(
                f"model.compile has no effect on this transformer ({type(module).__name__}), whose class names no"
                " repeated blocks: set it to false"
            ) from error


def _refuse_if_ignored(module: Any) -> None:
    if not any(hasattr(getattr(layer, "processor", None), "_attention_backend") for layer in module.modules()):
        raise UserError(
            f"model.attention has no effect on this transformer ({type(module).__name__}), which calls PyTorch's"
            " attention directly: set it to auto"
        )


def _keep_dtype_of_queries_and_keys(module: Any) -> None:
    """CUDA's autocast computes their norms in float32, and foreign kernels refuse float32 beside bfloat16 values."""
    for name, norm in module.named_modules():
        if name.rpartition(".")[2] in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            norm.register_forward_hook(_in_dtype_of_input)


def _in_dtype_of_input(_norm: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.to(arguments[0].dtype)
