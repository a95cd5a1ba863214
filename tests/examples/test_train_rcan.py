"""The training example: the loss falls, a run that goes on is the run that never stopped, and Ctrl-C leaves nothing half-written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastsr
from tests.interrupting import PATIENCE, interrupt, start

pytest.importorskip("skimage", reason="the photographs come with scikit-image")

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--features", "8", "--groups", "1", "--blocks", "2", "--patch", "12", "--batch", "4", "--rate", "2e-3"]


def training(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "examples/train_rcan.py", "--checkpoint", str(folder / "m.pth"), *TINY, *words]
    return start(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def train(folder: Path, *words: str, code: int = 0) -> str:
    process = training(folder, *words)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, out + err
    return out + err


def losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss (\d\.\d+)", text)]


def test_the_loss_falls_and_going_on_is_never_having_stopped(tmp_path):
    words = ["--memory", "none", "--dtype", "bf16"]
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = losses(train(tmp_path / "whole", "--steps", "30", *words))
    assert len(whole) == 30
    assert sum(whole[-5:]) < 0.8 * sum(whole[:5])
    parts = losses(train(tmp_path / "parts", "--steps", "12", *words))
    out = train(tmp_path / "parts", "--steps", "30", *words)
    assert "from step 12" in out
    assert parts + losses(out) == whole
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["m.pth"]
    models = [fastsr.load(tmp_path / name / "m.pth") for name in ("whole", "parts")]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert "was trained with --rate 0.002, and this run has 0.001" in train(tmp_path / "parts", *words, "--rate", "1e-3", code=1)


def test_ctrl_c_keeps_the_step_and_leaves_no_partial_file(tmp_path):
    process = training(tmp_path, "--steps", "100000", "--memory", "none", "--every", "1")
    out, err = interrupt(process, when=(tmp_path / "m.pth").exists)
    assert process.returncode == 130, out + err
    assert "stopping after this step" in err
    assert os.listdir(tmp_path) == ["m.pth"]
    done = torch.load(tmp_path / "m.pth", weights_only=True)
    assert len(done["losses"]) == len(losses(out)) > 0


def test_pictures_that_are_too_small_are_named(tmp_path):
    assert "no picture has 9600 pixels on each side" in train(tmp_path, "--patch", "2400", code=1)
    assert not list(tmp_path.iterdir())


def test_a_budget_changes_no_number(tmp_path):
    """The benchmark's proof on a small scale: the same losses and the same weights within a budget that asks for recomputation."""
    words = ["--blocks", "6", "--steps", "6"]
    for name in ("free", "within"):
        (tmp_path / name).mkdir()
    free = train(tmp_path / "free", *words, "--memory", "none")
    within = train(tmp_path / "within", *words, "--memory", "1MB")
    assert losses(within) == losses(free)
    assert len(losses(free)) == 6
    plan = re.search(r"plan within 1MB: peak (\d+) KiB, .*recomputes .* (\d+\.\d)% of the step", within)
    assert plan is not None, within
    assert int(plan[1]) <= 977
    assert float(plan[2]) > 0
    models = [fastsr.load(tmp_path / name / "m.pth") for name in ("free", "within")]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
