"""Jobs on the pretended GPU: ``python -m tests.gpu JOBS``, with ``PRETEND_GPU`` set.

JOBS is a JSON list of ``[NAME, ARGUMENT, ...]``. They need a process of their own, since the pretended GPU must be
there before PyTorch. Their scoring processes do not import it, as they would import any other main module.
"""

from __future__ import annotations

from tests.gpu.jobs import JOBS  # isort: skip - it pretends before whatever imports torch

import json
import sys

from tests.gpu.conftest import END

if __name__ == "__main__":
    for name, *arguments in json.loads(sys.argv[1]):
        JOBS[name](*arguments)
        print(END, end="", flush=True)  # noqa: T201
