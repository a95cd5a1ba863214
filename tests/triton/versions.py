"""The Triton versions that the tests cover: the installed one, the oldest supported and the newest.

Other versions than the installed one go into side folders `build/triton-<version>`, once; a process that has such a
folder first in its PYTHONPATH runs with that version.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.building import one_process_at_a_time

ROOT = Path(__file__).resolve().parents[2]
OLDEST, NEWEST = "3.6.0", "3.9.0"

#: What pip says when it reaches no index; any other failure is a failure of the test.
OFFLINE = r"Failed to establish a new connection|Temporary failure in name resolution|connection broken|Network is unreachable"


def installed() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


#: Distinct versions, oldest first.
VERSIONS = sorted({OLDEST, NEWEST, installed() or NEWEST}, key=lambda version: [int(part) for part in re.findall(r"\d+", version)[:3]])


def environment(version: str, **variables: str) -> dict[str, str]:
    """The variables of a process that runs with this Triton; it is installed first where needed."""
    paths = [] if version == installed() else [str(side_folder(version))]
    inherited = [path for path in [os.environ.get("PYTHONPATH")] if path]
    own = {"PYTHONPATH": os.pathsep.join([*paths, str(ROOT), *inherited]), "TRITON_CACHE_DIR": str(ROOT / "build" / "triton-cache")}
    return {**os.environ, **own, **variables}


def side_folder(version: str) -> Path:
    """The folder that holds this Triton, installed on first use; skips the test where no package index can be reached."""
    folder = ROOT / "build" / f"triton-{version}"
    folder.parent.mkdir(exist_ok=True)
    with one_process_at_a_time(folder):
        if not folder.exists():
            _install(version, folder)
    return folder


def _install(version: str, folder: Path) -> None:
    # Triton 3.6's interpreter takes no loop bound from an argument under numpy 2.4.
    wanted = [f"triton=={version}", *(["numpy<2.4"] if version == OLDEST else [])]
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an installation that was stopped
    command = [*pip(), "install", "--quiet", "--no-deps", "--retries=1", "--timeout=30", f"--target={partial}", *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(partial, ignore_errors=True)
        if re.search(OFFLINE, done.stdout + done.stderr):
            pytest.skip(f"offline: {' and '.join(wanted)} cannot be installed into {folder}")
        pytest.fail(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}", pytrace=False)
    partial.rename(folder)


def pip() -> list[str]:
    """The pip that serves this Python, which may have none of its own."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    found = shutil.which("pip3") or shutil.which("pip")
    if found is None:
        pytest.fail("no pip: install python3-pip, or make the virtual environment with ensurepip", pytrace=False)
    return [found, "--python", sys.executable]
