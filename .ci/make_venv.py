"""Make a virtual environment with pip in it, also where Python came without ensurepip (a bare Debian)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def main(folder: str) -> int:
    python = sys.executable
    existed = Path(folder).exists()
    if subprocess.run([python, "-m", "venv", folder], capture_output=True, check=False).returncode == 0:
        return 0
    if not existed:
        shutil.rmtree(folder, ignore_errors=True)  # what the failed attempt left
    made = subprocess.run([python, "-m", "venv", "--without-pip", folder], check=False).returncode == 0
    if made:
        pip = [python, "-m", "pip", "--python", f"{folder}/bin/python", "install", "-q", "pip"]
        if subprocess.run(pip, check=False).returncode == 0:
            return 0
    if not existed:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{python} can make no virtual environment with pip in {folder}.\n"
        "On Debian: apt-get install python3-venv (or python3-pip). Or reuse an environment: make VENV=path ...",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
