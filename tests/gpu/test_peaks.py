"""Peaks of a training pass on fake CUDA tensors, with the quantised layers of the libraries, against the estimate."""

from __future__ import annotations

import pytest

from tests.gpu.conftest import Jobs

pytestmark = pytest.mark.slow


def test_estimated_peaks_are_those_of_a_pass_on_cuda(jobs: Jobs) -> None:
    """At FLUX's width, where matrices count; without and with gradient checkpointing."""
    for output in jobs(*(["peaks", kind] for kind in ("none", "int8", "fp8", "nf4"))):
        rows = [line.split() for line in output.splitlines()]
        assert [row[1] for row in rows] == ["False", "True"]
        for row in rows:
            assert int(row[3]) == pytest.approx(int(row[2]), rel=0.05), row
