"""The library of the pretended GPU, compiled once for the whole suite, and a process of its own for its jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from filelock import FileLock

SOURCE = Path(__file__).with_name("pretend_gpu.cpp")
TORCH = Path(torch.__file__).parent
END = "-- end of the job --\n"
"""What ``python -m tests.gpu`` prints after each job."""

Jobs = Callable[..., list[str]]
"""Runs jobs of ``tests.gpu.jobs.JOBS``, each given by its name and arguments; returns what each one printed."""


def compile_library(target: Path) -> Path:
    """The library at ``target``, with the headers that PyTorch brings."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler (c++), which the pretended GPU needs")
    if torch.backends.cuda.is_built():
        pytest.skip("this PyTorch is built for CUDA; the pretended GPU needs one that is built for the CPU alone")
    libraries = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{TORCH / 'lib'}"]
    options = ["-O1", "-std=c++20", "-shared", "-fPIC", f"-I{TORCH / 'include'}"]
    done = subprocess.run(
        [compiler, *options, str(SOURCE), *libraries, "-o", str(target)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return target


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One for all the test processes."""
    own = tmp_path_factory.getbasetemp()
    folder = own if worker_id == "master" else own.parent
    target = folder / "libpretend.so"
    with FileLock(folder / "libpretend.lock"):
        return target if target.is_file() else compile_library(target)


@pytest.fixture
def jobs(library: Path) -> Jobs:
    """Jobs in one process, since starting it takes longer than most of them. One that fails fails the test."""

    def run(*each: Sequence[str | Path]) -> list[str]:
        command = [sys.executable, "-m", "tests.gpu", json.dumps(each, default=str)]
        done = subprocess.run(
            command,
            env={**os.environ, "PRETEND_GPU": str(library), "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout.split(END)[:-1]

    return run
