"""``gdro`` on the pretended GPU that the variable PRETEND_GPU names; its scoring processes do without one."""

from __future__ import annotations

from tests.gpu.pretend_gpu import pretend_gpu  # isort: skip - before whatever imports torch

from gdro_cli.cli.app import main

if __name__ == "__main__":
    with pretend_gpu():
        main()
