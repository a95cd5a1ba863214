"""The ESRGAN example: the loss falls, its one line changes no loss, a run may go on with or without it, and its result is ours too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastsr

pytest.importorskip("skimage", reason="the photographs come with scikit-image")

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--features", "8", "--growth", "4", "--blocks", "1", "--patch", "8", "--batch", "4", "--rate", "2e-3", "--warmup", "16"]


def train(folder: Path, *words: str, code: int = 0) -> str:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "examples/train_esrgan.py", "--checkpoint", str(folder / "m.pth"), *TINY, "--milestones", "16", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss (\d\.\d+)", text)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_one_line_changes_no_loss_and_a_run_goes_on_with_or_without_it(tmp_path, dtype):
    words = ["--dtype", dtype]
    fused = train(tmp_path / "fused", "--steps", "24", *words)
    assert "residual dense block" in fused
    plain = train(tmp_path / "plain", "--steps", "24", "--own-code", *words)
    assert "its own code" in plain
    assert len(losses(fused)) == 24
    assert sum(losses(fused)[10:16]) < 0.8 * sum(losses(fused)[:6])
    assert losses(fused)[:16] == pytest.approx(losses(plain)[:16], rel=2e-3 if dtype == "fp32" else 5e-2)
    assert losses(fused)[16:] == pytest.approx(losses(plain)[16:], rel=5e-2 if dtype == "fp32" else 0.2)  # adversaries part sooner
    first = train(tmp_path / "parts", "--steps", "12", *words)
    second = train(tmp_path / "parts", "--steps", "24", *words)
    assert "from step 12" in second
    assert losses(first) + losses(second) == losses(fused)
    runs = [torch.load(tmp_path / name / "m.pth", weights_only=True) for name in ("fused", "parts", "plain")]
    assert all(torch.equal(tensor, runs[1]["params"][key]) for key, tensor in runs[0]["params"].items())
    assert {key: t.shape for key, t in runs[0]["params"].items()} == {key: t.shape for key, t in runs[2]["params"].items()}
    assert "from step 24" in train(tmp_path / "fused", "--steps", "25", "--own-code", *words)
    assert "from step 24" in train(tmp_path / "plain", "--steps", "25", *words)


def test_the_checkpoint_is_a_model_of_ours(tmp_path):
    train(tmp_path, "--steps", "2")
    model = fastsr.load(tmp_path / "m.pth")
    state = torch.load(tmp_path / "m.pth", weights_only=True)
    assert any(all(torch.equal(t, state[which][key]) for key, t in model.state_dict().items()) for which in ("params", "params_ema"))
    assert model(torch.rand(1, 3, 8, 8)).shape == (1, 3, 32, 32)


def test_what_does_not_fit_is_named(tmp_path):
    train(tmp_path, "--steps", "1")
    assert "was trained with --growth 4, and this run has 5" in train(tmp_path, "--steps", "2", "--growth", "5", code=1)
    assert "no picture has 9600 pixels on each side" in train(tmp_path, "--patch", "2400", code=1)
