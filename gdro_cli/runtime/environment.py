"""What a run ran on: versions, machine, devices, and the commit of a checkout. It goes into runs and bug reports."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "gdro_cli",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pillow",
    "pydantic",
    "paddleocr",
    "onnxruntime",
    "triton",
    "torchao",
    "bitsandbytes",
    "pyarrow",
    "flash-attn",
    "xformers",
)
_COMMAND_SECONDS = 5.0


def environment() -> dict[str, Any]:
    """Describe the environment as JSON values.

    Returns:
        ``python``, ``platform``, ``cpu``, ``cpus``, ``packages`` (name -> version, None = not installed), ``commit``
        (None outside a checkout; ends in ``+`` when files are changed), ``devices`` (names), ``cuda`` (None without a
        GPU: versions of CUDA, driver, cuDNN and NCCL, memory and compute capability of each GPU) and ``threads``.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(Path(__file__).resolve().parents[2]),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"],
        "cuda": _cuda() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def _cuda() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
    return {
        "runtime": torch.version.cuda,
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]),
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, nccl)) or None,
        "memory_gb": [round(gpu.total_memory / 1e9, 1) for gpu in gpus],
        "capability": [f"{gpu.major}.{gpu.minor}" for gpu in gpus],
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit(root: Path) -> str | None:
    """The commit of the checkout in ``root``; None if it is not a checkout, or git is absent."""
    if not (root / ".git").exists():
        return None
    return _output(["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"])


def _output(command: list[str]) -> str | None:
    """What a command prints; None if it fails or is not installed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
