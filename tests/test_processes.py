"""Which GPU another process sees."""

from __future__ import annotations

import pytest

from gdro_cli.processes import only_gpu


@pytest.mark.parametrize(
    ("visible", "index", "expected"),
    [
        (None, 0, "0"),
        (None, 3, "3"),
        ("4,5", 1, "5"),
        ("4, 5 ", 1, "5"),
        ("GPU-aa,GPU-bb", 0, "GPU-aa"),
        ("", 0, ""),  # hides all GPUs
        ("", 1, ""),
        ("-1", 1, "-1"),  # also hides all GPUs
    ],
)
def test_only_gpu(visible: str | None, index: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert only_gpu(index) == expected
