"""torchvision is built for another torch here; what imports it needs two of its operators declared first."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

WITHOUT_LIBRARY = "does not exist"


@pytest.fixture(scope="session")
def torchvision_imports() -> Iterator[None]:
    """Where torchvision's library does not load, the operators that its Python side registers are declared."""
    library = None
    if importlib.util.find_spec("torchvision") is not None:
        probe = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
        if probe.returncode and WITHOUT_LIBRARY in probe.stderr:
            library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    yield
    del library
