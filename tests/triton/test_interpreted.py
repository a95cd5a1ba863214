"""Runs `tests/triton/interpreted` in Triton's interpreter, in a process of its own, with each supported Triton."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton.versions import ROOT, VERSIONS, environment, installed

FOLDER = Path(__file__).with_name("interpreted")


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
def test_kernels_in_the_interpreter(version):
    command = [sys.executable, "-m", "pytest", str(FOLDER), "--tb=short", "-rfEs", "--disable-warnings"]
    if version != installed():
        command += ["-k", "not as_good_as_eager"]  # the long lists run with the installed Triton
    env = environment(version, TRITON_INTERPRET="1", FASTSR_TEST_DEVICE="cpu", EXPECTED_TRITON=version)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    print(done.stdout)
    if done.returncode:
        pytest.fail(f"in the interpreter of Triton {version}:\n{done.stdout}{done.stderr}", pytrace=False)
    assert re.search(r"[1-9]\d* passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout, done.stdout
