"""Shared set-up: two threads, and no run without the native library."""

from __future__ import annotations

import os

import pytest
import torch

from fastsr import _native


def pytest_configure(config: pytest.Config) -> None:
    if _native.missing and os.environ.get("FASTSR_TEST_WITHOUT_NATIVE") != "1":
        raise pytest.UsageError(f"the native library is missing: {_native.missing}; run `make build` (the tests prove it)")
    torch.set_num_threads(int(os.environ.get("FASTSR_TEST_THREADS", "2")))
