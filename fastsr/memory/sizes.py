"""Sizes as people write them: "2GiB", "500MB", or a number of bytes."""

from __future__ import annotations

import re

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(size: int | str) -> int:
    """The number of bytes; KB, MB and GB are powers of 1000, KiB, MiB and GiB of 1024.

    Raises:
        ValueError: `size` is no positive size.
        TypeError: `size` is neither an int nor a string.
    """
    expected = 'expected a number of bytes above zero, or a size like "2GiB" or "500MB"'
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise TypeError(f"budget is {size!r} of type {type(size).__name__}; {expected}")
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", size)
        unit = (match[2] or "B").upper() if match else ""
        if match is None or unit not in _UNITS:
            raise ValueError(f"budget is {size!r}; {expected}")
        size = int(float(match[1]) * _UNITS[unit])
    if size <= 0:
        raise ValueError(f"budget is {size!r}; {expected}")
    return size


def format_bytes(size: float) -> str:
    """With three digits and a binary unit, as budgets are mostly given."""
    return _scaled(size, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def format_flops(flops: float) -> str:
    """With three digits, as KFLOP to PFLOP."""
    return _scaled(flops, 1000, ("FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    power = 0
    while value >= step and power < len(units) - 1:
        value, power = value / step, power + 1
    return f"{value:.3g} {units[power]}" if value < 1000 else f"{value:.0f} {units[power]}"
