"""The acceptance of a GPU: ``python -m tests.gpu.acceptance OUT_FOLDER``. docs/hardware.md has the table of checks.

Each check is a row of OUT_FOLDER/acceptance.jsonl as soon as it is known. The same command continues after a stop.
Exit code: 0 = every row passed, 1 = a row failed, 3 = none failed, but some were skipped.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

ROOT = Path(__file__).parents[3]


def read_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.acceptance", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT_FOLDER")
    parser.add_argument("--sections", help="numbers of the sections to run, such as 0,3,5 (default: all)")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no section starts (540)")
    parser.add_argument("--commit", help="the commit under test, for a copy of the files without its history")
    parser.add_argument("--pretend", type=Path, metavar="LIB", help="library of the pretended GPU (tests/gpu/conftest)")
    parser.add_argument("--tiny", action="store_true", help="tiny random models in place of full-size ones")
    parser.add_argument(
        "--report",
        type=Path,
        nargs="?",
        const=ROOT / "docs/measured",
        metavar="FOLDER",
        help="run nothing; write the rows of OUT_FOLDER to FOLDER/<card>-<date>.json (default: docs/measured)",
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    began, given = time.monotonic(), read_arguments(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # section 7 asks for deterministic products
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if given.report is not None:
        from tests.gpu.acceptance.rows import write_report

        print(write_report(given.out, given.report))  # noqa: T201
        return 0
    if given.pretend is None:
        from tests.gpu.acceptance.sections import run

        return run(given, began=began)
    os.environ["PRETEND_GPU"] = str(given.pretend.resolve())
    from tests.gpu.pretend_gpu import pretend_gpu  # before whatever imports torch

    with pretend_gpu():
        from tests.gpu.acceptance.sections import run

        return run(given, began=began)


if __name__ == "__main__":
    raise SystemExit(main())
