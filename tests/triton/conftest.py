"""The interpreter and the compiler of Triton exclude each other in one process: `TRITON_INTERPRET=1` says whose it is."""

from __future__ import annotations

from fastsr.backends import triton_interpreted

collect_ignore = ["test_interpreted.py", "test_ahead_of_time.py"] if triton_interpreted() else ["interpreted"]
