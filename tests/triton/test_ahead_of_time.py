"""Every Triton kernel compiles for sm_80, sm_90, sm_100 and gfx942 within its budgets, without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastsr.kernels.triton_support import FAMILIES
from tests.triton.versions import VERSIONS, environment

SCRIPT = Path(__file__).with_name("ahead_of_time.py")


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS)
def test_every_configuration_compiles_without_spills(version):
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment(version), capture_output=True, text=True, check=False)
    cases = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert cases, f"nothing was compiled:\n{done.stderr}"
    wrong = [f"{case['case']}: {case['error']}" for case in cases if "error" in case]
    assert not wrong, f"{len(wrong)} of {len(cases)} cases:\n" + "\n".join(wrong)
    assert {case["triton"] for case in cases} == {version}
    assert {case["family"] for case in cases} == set(FAMILIES)
    assert done.returncode == 0, done.stderr
