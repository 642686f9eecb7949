"""How the transformer is computed: its attention kernels, and whether its blocks are compiled."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
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
    _rotate_in_one_product(module)
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


def _rotate_in_one_product(module: Any) -> None:
    """Replace the rotary embedding of FLUX's classes, for all models of the process, by ``rotated``."""
    classes: Any = sys.modules[type(module).__module__]
    if type(module).__name__.startswith("Flux") and hasattr(classes, "apply_rotary_emb"):
        classes.apply_rotary_emb = rotated


def rotated(x: Tensor, freqs_cis: tuple[Tensor, Tensor], *, sequence_dim: int = 2) -> Tensor:
    """The rotary embedding ``apply_rotary_emb`` of diffusers, on the CPU as one complex product.

    In float32 the bits are the same on x86 for heads of a multiple of 16 numbers, which PyTorch multiplies in whole
    vectors. Other devices, whose complex products round in their own way, and compiled code, which has none, keep
    diffusers' form.

    Args:
        x: queries or keys [N, S, H, D] (``sequence_dim`` 1) or [N, H, S, D] (2), interleaved pairs.
        freqs_cis: cosines and sines [S, D], each number twice.
        sequence_dim: 1 or 2.

    Returns:
        The shape and dtype of ``x``.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        from diffusers.models import embeddings

        own: Any = embeddings.apply_rotary_emb(x, freqs_cis, sequence_dim=sequence_dim)  # type: ignore[arg-type]
        return cast(Tensor, own)
    cos, sin = (part[:, ::2].unsqueeze(2 - sequence_dim) for part in freqs_cis)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


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
