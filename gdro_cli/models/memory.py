"""Ways to save memory: a quantised base, one part on the device at a time, recomputed blocks, a decoder in pieces."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gdro_cli.errors import PrerequisiteError, UserError

Quantization = Literal["none", "int8", "fp8", "nf4"]
ModelPart = Literal["text", "transformer", "vae"]

_PACKAGES: dict[str, str] = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}
"""The package that quantises; each is an extra of the same name."""


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """Ways to save memory; the defaults use none."""

    quantization: Quantization = "none"
    """How the linear layers of the frozen transformer are stored."""
    offload: bool = False
    """Keep text encoders, transformer and autoencoder on the CPU, except the part in use."""
    vae_slicing: bool = False
    """Decode and encode one image at a time."""
    vae_tiling: bool = False
    """Decode and encode a large image in overlapping tiles, which changes it slightly."""


class OneAtATime:
    """Keeps only the part of a model that was used last on the device, and the others on the CPU.

    Args:
        device: where a part runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_device: dict[str, nn.Module] = {}
        self._part: ModelPart | None = None

    def use(self, part: ModelPart, name: str, module: nn.Module) -> None:
        """Move ``module`` to the device, after moving the modules of another part to the CPU.

        Args:
            part: the part of the module; the modules of one part stay together.
            name: name of the module.
            module: the module that is about to run.
        """
        if part != self._part:
            self.clear()
            self._part = part
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        if self._on_device.get(name) is not module:
            self._on_device[name] = module.to(self._device)

    def clear(self) -> None:
        """Move all modules to the CPU."""
        for module in self._on_device.values():
            module.to("cpu")
        self._on_device.clear()

    def forget(self, name: str) -> None:
        """Drop the reference to a module that is freed."""
        self._on_device.pop(name, None)


def quantization_config(kind: Quantization, *, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the quantization config with which diffusers loads a network; None for ``none``.

    ``int8`` and ``fp8``: weights in 8 bits with one float32 scale per output, through torchao. ``nf4``: 4-bit normal
    floats (QLoRA, arXiv 2305.14314) with one float32 scale per 64 weights, through bitsandbytes. Products are always
    computed in ``dtype``.

    Raises:
        PrerequisiteError: the package is not installed, or the device does not support it.
    """
    if kind == "none":
        return None
    package = _PACKAGES[kind]
    if find_spec(package) is None:
        raise PrerequisiteError(
            f"model.quantization {kind} needs the package {package}: run `pip install 'gdro_cli[{package}]'`, or set"
            " model.quantization=none (docs/memory.md#quantised-base)"
        )
    if kind == "nf4":
        if device.type != "cuda":
            raise PrerequisiteError(
                "model.quantization nf4 needs a CUDA GPU, which quantises the weights as they load: set it to int8 or"
                " fp8 to continue without one"
            )
        from diffusers import BitsAndBytesConfig

        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())


def prepare_quantised(transformer: nn.Module, dtype: torch.dtype) -> None:
    """Make quantised layers answer in ``dtype``, and keep no unpacked weights for the backward pass.

    Both libraries answer in the dtype of the input, which autocast makes float32 behind most norms. torchao unpacks a
    weight in sight of autograd, which would keep the copy; bitsandbytes unpacks it again by itself.
    """
    for layer in transformer.modules():
        if isinstance(layer, nn.Linear) and type(layer.weight) is not nn.Parameter:
            layer.register_forward_pre_hook(lambda _, arguments: (arguments[0].to(dtype), *arguments[1:]))
            if type(layer) is nn.Linear:
                layer.__class__ = _FrozenLinear


class _FrozenLinear(nn.Linear):
    """A layer whose weights are quantised and not trained."""

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _FrozenProduct.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return product


class _FrozenProduct(torch.autograd.Function):
    """``x @ weight.T + bias``; the backward pass unpacks the weight again."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = context.saved_tensors
        return gradient @ weight.dequantize().to(gradient.dtype), None, None


def checkpoint_blocks(transformer: Any, share: float) -> None:
    """Recompute the activations of a share of the transformer's blocks, evenly spread, in the backward pass.

    Args:
        transformer: a model of diffusers.
        share: 0 = no block, 1 = all.
    """
    if share == 0:
        return
    if share == 1:
        transformer.enable_gradient_checkpointing()
        return
    blocks = [block for part in transformer.children() if isinstance(part, nn.ModuleList) for block in part]
    chosen = {id(block) for number, block in enumerate(blocks) if int((number + 1) * share) > int(number * share)}

    def run(block: nn.Module, *arguments: Any) -> Any:
        return checkpoint(block, *arguments, use_reentrant=False) if id(block) in chosen else block(*arguments)

    transformer.enable_gradient_checkpointing(run)


def prepare_vae(vae: Any, options: MemoryOptions) -> None:
    """Make the autoencoder work in pieces as the options say.

    Raises:
        UserError: its class cannot.
    """
    for enabled, mode in ((options.vae_slicing, "slicing"), (options.vae_tiling, "tiling")):
        try:
            if enabled:
                getattr(vae, f"enable_{mode}")()
        except (AttributeError, NotImplementedError) as error:
            name = type(vae).__name__
            raise UserError(
                f"model.vae_{mode} has no effect on the autoencoder of this model ({name}): set it to false"
            ) from error
