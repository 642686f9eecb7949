"""``gdro`` on the pretended GPU that the variable PRETEND_GPU names; its scoring processes do without one."""

from __future__ import annotations

if __name__ == "__main__":  # the scoring processes import this file, and should not import all of this
    from tests.gpu.pretend_gpu import pretend_gpu  # isort: skip - before whatever imports torch
    from gdro_cli.cli.app import main

    with pretend_gpu():
        main()
