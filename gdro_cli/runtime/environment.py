"""What a run ran on: versions, machine, devices, and the commit of a checkout. Goes into runs and bug reports."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

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
)
_GIT_SECONDS = 5.0


def environment(*, devices: bool = True) -> dict[str, Any]:
    """Describe the environment as JSON values.

    Args:
        devices: also ask torch for its devices and threads, which imports it.

    Returns:
        ``python``, ``platform``, ``cpu``, ``cpus``, ``packages`` (name -> version, None = not installed), ``commit``
        (None outside a checkout; ends in ``+`` when files are changed), and with ``devices`` also ``devices`` (names)
        and ``threads``.
    """
    described: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(Path(__file__).resolve().parent),
    }
    if devices:
        import torch

        cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        described["devices"] = cuda or ["cpu"]
        described["threads"] = torch.get_num_threads()
    return described


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit(folder: Path) -> str | None:
    """The commit of the checkout that holds ``folder``, or None if the package is installed elsewhere."""
    commit = _git(folder, "rev-parse", "HEAD") if (folder.parent.parent / ".git").exists() else ""
    changed = commit and _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit + ("+" if changed else "") or None


def _git(folder: Path, *arguments: str) -> str:
    """Output of a git command, empty if it fails or git is absent."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
