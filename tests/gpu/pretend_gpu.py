"""A pretended GPU: tensors that say ``cuda:0``, keep their numbers on the CPU, and refuse to meet tensors of the host.

Importing this loads the compiled ``pretend_gpu.cpp``, named by the variable ``PRETEND_GPU``; it must come before torch.
Inside ``pretend_gpu()`` the process believes in one GPU. The dispatcher takes CUDA's keys, so autocast is CUDA's own,
and an operation that mixes devices raises as CUDA's would. What it cannot show: kernels, streams, the allocator, NCCL,
and CUDA's rounding. Inference tensors are not told apart either; the tests on the CPU do that.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

ctypes.CDLL(os.environ["PRETEND_GPU"], mode=ctypes.RTLD_GLOBAL)  # torch looks for the hooks once, when it is imported

import diffusers.models.modeling_utils  # noqa: F401 - asks for CUDA when it is imported, so while there is none yet
import torch
import torch._dynamo
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten, CUDA = torch.ops.aten, torch.device("cuda", 0)
_INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
"""Operations whose indices may lie on the host."""
_READS = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default)
"""Operations whose result is a number of the host."""

_LAZY = (aten._conj.default, aten._neg_view.default)
"""Views that only set a flag, which a ``Gpu`` cannot have: here they are computed."""


class Gpu(torch.Tensor):
    """A tensor on the pretended GPU; its numbers are in ``host``."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> Gpu:
        self = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=CUDA,
        )
        self.host = host
        return self  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.numpy:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is torch.Tensor.tolist:
            return args[0].host.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        owner = getattr(func, "__self__", None)
        if getattr(func, "__name__", "") == "__set__" and getattr(owner, "__name__", "") == "data":
            args[0].host = args[1].host
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return _run(func, args, kwargs or {})


def _on_host(tree: Any) -> Any:
    return tree_map(lambda x: x.host if isinstance(x, Gpu) else x, tree)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the host's numbers, as the device that its tensors say would."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, Gpu)]
    others = [x for x in tensors if not isinstance(x, Gpu) and x.dim()]  # a scalar of the host may meet a GPU's tensor
    device = kwargs.get("device")
    if func is aten.copy_.default:  # between devices, into its first argument
        func(*_on_host(args), **_on_host(kwargs))
        return args[0]
    if ours and others and func is not aten._to_copy.default:
        indices = func in _INDEXING and isinstance(args[0], Gpu) and not any(x.is_floating_point() for x in others)
        if not indices:
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} of cuda:0 and cpu")
    options = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    if device is not None and func is not aten._to_copy.default:
        options["device"] = "cpu"
    result = func(*_on_host(args), **_on_host(options))
    to_gpu = bool(ours) if device is None else torch.device(device).type == "cuda"
    if func in _READS or not to_gpu:
        return result
    if func in _LAZY:
        return Gpu(result.resolve_conj().resolve_neg())
    wrapped = tree_map(lambda x: Gpu(x) if isinstance(x, torch.Tensor) else x, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if ours else wrapped


class _Watch(TorchDispatchMode):
    """Sends whatever names the GPU, or has a tensor on it, to ``_run``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [*tree_leaves(args), *tree_leaves(kwargs)]
        if not any(isinstance(x, Gpu) or (isinstance(x, torch.device | str) and str(x)[:4] == "cuda") for x in leaves):
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        with torch.inference_mode(False), torch.no_grad():
            return _run(func, args, kwargs)


@contextlib.contextmanager
def pretend_gpu(*, numbers: bool = True) -> Iterator[None]:
    """Believe in one GPU inside the block; without ``numbers`` its tensors are the caller's, such as fake ones."""
    import torch.cuda.amp.common as common

    compatible = torch._has_compatible_shallow_copy_type
    answers: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "is_available": True,
            "is_initialized": True,
            "device_count": 1,
            "current_device": 0,
            "is_bf16_supported": True,
            "get_device_name": "a pretended GPU",
            "get_device_capability": (9, 0),
            "max_memory_allocated": 2 * 10**9,
            "get_device_properties": SimpleNamespace(total_memory=80 * 2**30, major=9, minor=0),
            "get_rng_state": torch.zeros(16, dtype=torch.uint8),
            **dict.fromkeys(
                (
                    "set_device",
                    "synchronize",
                    "empty_cache",
                    "set_rng_state",
                    "reset_peak_memory_stats",
                    "manual_seed_all",
                    "_lazy_init",
                )
            ),
        },
        torch.accelerator: {"is_available": True, "device_count": 1, "current_accelerator": torch.device("cuda")},
        common: {"amp_definitely_not_available": False},
    }
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters keep their identity, as on a real device
    with contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        for owner, values in answers.items():
            for name, value in values.items():
                put(owner, name, lambda *args, answer=value, **kwargs: answer)
        put(torch.Tensor, "pin_memory", lambda self, device=None: self.clone())
        put(
            torch,
            "_has_compatible_shallow_copy_type",
            lambda a, b: isinstance(a, Gpu) == isinstance(b, Gpu) and compatible(a, b),
        )
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        if numbers:
            stack.enter_context(_Watch())
        yield
