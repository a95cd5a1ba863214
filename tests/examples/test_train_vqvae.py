"""The VQ-VAE example: a run that goes on is the run that never stopped, and its report tells the truth."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastsr
from tests.interrupting import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--features", "8", "--codes", "16", "--channels", "4", "--patch", "16", "--batch", "4", "--rate", "3e-3"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Two smooth pictures, one of them held out by its name."""
    folder = tmp_path_factory.mktemp("pictures")
    y, x = np.mgrid[:48, :64] / 64
    for name, phase in (("a.png", 0.0), ("coffee.png", 0.4)):
        waves = [np.sin(5 * x + phase), np.cos(7 * y - phase), np.sin(4 * (x + y))]
        Image.fromarray((127.5 * (np.stack(waves, -1) + 1)).astype(np.uint8)).save(folder / name)
    return folder


def train(folder: Path, pictures: Path, *words: str, code: int = 0) -> str:
    command = [sys.executable, "examples/train_vqvae.py", "--pictures", str(pictures), "--checkpoint", str(folder / "m.pth")]
    command += ["--output", str(folder / "out"), *TINY, *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("levels", ["1", "2"])
def test_going_on_is_never_having_stopped(tmp_path, pictures, levels):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "whole", pictures, "--steps", "24", "--levels", levels)
    first = train(tmp_path / "parts", pictures, "--steps", "9", "--levels", levels)
    second = train(tmp_path / "parts", pictures, "--steps", "24", "--levels", levels)
    assert "from step 9" in second
    runs = [torch.load(tmp_path / name / "m.pth", weights_only=True) for name in ("whole", "parts")]
    assert len(runs[0]["losses"]) == 24
    assert runs[0]["losses"] == runs[1]["losses"]
    assert all(torch.equal(tensor, runs[1]["params"][key]) for key, tensor in runs[0]["params"].items())
    assert re.findall(r"loss (\S+)", first) + re.findall(r"loss (\S+)", second) == re.findall(r"loss (\S+)", whole)

    figures = json.loads((tmp_path / "whole" / "out" / "figures.json").read_text())
    model = fastsr.load(tmp_path / "whole" / "m.pth")
    x = torch.from_numpy(np.array(Image.open(pictures / "coffee.png"))).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        found = model(x)
    error = ((found.reconstruction.clamp(-1, 1) - x) / 2).square().mean()
    assert figures["pictures"] == ["coffee.png"]
    assert figures["psnr_db"] == pytest.approx(-10 * error.log10().item(), abs=0.02)
    assert figures["codes_used"] == [len(level.unique()) for level in found.indices]
    assert (tmp_path / "whole" / "out" / "side-by-side.png").stat().st_size > 1000


def test_other_options_than_the_checkpoint_s_are_named(tmp_path, pictures):
    train(tmp_path, pictures, "--steps", "1")
    out = train(tmp_path, pictures, "--steps", "2", "--codes", "32", code=1)
    assert "was trained with --codes 16, and this run has 32" in out
    assert "no picture has 4096 pixels on each side" in train(tmp_path, pictures, "--patch", "4096", code=1)
