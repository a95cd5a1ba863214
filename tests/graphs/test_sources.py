"""Nothing in the CUDA sources waits for the GPU or allocates past torch: recording would fail, or a replay read freed memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
FORBIDDEN = (
    r"\b(cudaMalloc\w*|cudaFree\w*|cudaStreamCreate\w*"
    r"|cuda(?:Device|Stream|Event)Synchronize|cudaMemcpy(?!\w*Async)\w*|cudaMemset(?!Async)\w*)\("
)


def calls(text: str) -> list[str]:
    """Forbidden calls outside of comments."""
    return [match.group(1) for line in text.splitlines() for match in re.finditer(FORBIDDEN, line.split("//")[0])]


def test_such_calls_are_found():
    text = "  cudaMalloc(&p, 4);  // cudaFree(p)\n  cudaMemcpyAsync(a, b);\n  cudaStreamSynchronize(s);"
    assert calls(text) == ["cudaMalloc", "cudaStreamSynchronize"]


@pytest.mark.skipif(not SOURCES.exists(), reason="runs in a source tree")
def test_no_source_has_one():
    files = [*SOURCES.rglob("*.cu"), *SOURCES.rglob("*.cuh")]
    assert files
    assert {path.name: found for path in files if (found := calls(path.read_text()))} == {}
