"""Peaks of a training pass on fake CUDA tensors, with the quantised layers of the libraries, against the estimate."""

from __future__ import annotations

import pytest

from tests.gpu.conftest import Job

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "package"), [("none", "torch"), ("int8", "torchao"), ("fp8", "torchao"), ("nf4", "bitsandbytes")]
)
def test_estimated_peaks_are_those_of_a_pass_on_cuda(kind: str, package: str, job: Job) -> None:
    """At FLUX's width, where matrices count; without and with gradient checkpointing."""
    pytest.importorskip(package)
    rows = [line.split() for line in job("peaks", kind).splitlines()]
    assert [row[1] for row in rows] == ["False", "True"]
    for row in rows:
        assert int(row[3]) == pytest.approx(int(row[2]), rel=0.05), row
