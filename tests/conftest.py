"""Shared set-up: two threads, no run without the native library, and what parallel workers need (`make test` starts some)."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: a thread that waits for another must leave its core to it. OpenMP reads this when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from fastsr import _native


def pytest_configure(config: pytest.Config) -> None:
    if _native.missing and os.environ.get("FASTSR_TEST_WITHOUT_NATIVE") != "1":
        raise pytest.UsageError(f"the native library is missing: {_native.missing}; run `make build` (the tests prove it)")
    torch.set_num_threads(int(os.environ.get("FASTSR_TEST_THREADS", "2")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `long` come first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
