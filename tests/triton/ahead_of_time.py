"""Compile every Triton kernel of the package without a GPU and hold each to its budgets; prints one JSON line a case.

Runs in a process of its own, since `triton.compile` fails once the interpreter is set, and with any Triton:

    PYTHONPATH=build/triton-3.6.0 python tests/triton/ahead_of_time.py [--only WORD]
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def all_cases() -> Iterator[Any]:
    """The cases that every `fastsr/kernels/<op>/triton.py` offers."""
    import fastsr.kernels

    for package in pkgutil.iter_modules(fastsr.kernels.__path__, "fastsr.kernels."):
        name = package.name + ".triton"
        if package.ispkg and importlib.util.find_spec(name):
            yield from importlib.import_module(name).aot_cases()


def compile_case(case: Any) -> dict[str, Any]:
    """Compile one case; its resources."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    is_hip = case.family.startswith("gfx")
    target = GPUTarget("hip", case.family, 64) if is_hip else GPUTarget("cuda", int(case.family.removeprefix("sm_")), 32)
    names = case.kernel.arg_names
    missing = [name for name in names if name not in case.signature and name not in case.constants]
    if missing:
        raise ValueError(f"{case.name}: neither a type nor a constant for {', '.join(missing)}")
    # An integer that Triton may specialise compiles anew for each image size.
    eager = [p.name for p in case.kernel.params if case.signature.get(p.name) in ("i32", "i64") and not p.do_not_specialize]
    if eager:
        raise ValueError(f"{case.name}: {', '.join(eager)} must be listed in do_not_specialize")
    source = ASTSource(
        case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs=dict(case.constants),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    started = time.perf_counter()
    compiled = triton.compile(source, target=target, options=dict(case.options))
    found = {"case": case.name, "family": case.family, "triton": triton.__version__, "seconds": round(time.perf_counter() - started, 2)}
    found["shared"] = compiled.metadata.shared
    assembly = compiled.asm["amdgcn" if is_hip else "ptx"]
    found["absent"] = [name for name in case.instructions if name not in assembly]
    return found | (amd_resources(assembly) if is_hip else cuda_resources(compiled))


def amd_resources(assembly: str) -> dict[str, int]:
    """Registers and scratch memory as the assembler's metadata states them; scalars spilled to vector registers cost no memory."""

    def read(key: str) -> int:
        return sum(int(value) for value in re.findall(rf"^\s*\.{key}:\s*(\d+)", assembly, re.MULTILINE))

    return {"registers": read("vgpr_count"), "spills": read("private_segment_fixed_size") + 4 * read("vgpr_spill_count")}


def cuda_resources(compiled: Any) -> dict[str, int]:
    """What the binary itself holds: registers, and the stack to which registers are spilled."""
    tools = Path(sys.modules["triton"].__file__ or "").parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run([str(tools / "cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True, check=False)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said.stdout))
    if len(found) != 3:
        raise RuntimeError(f"cuobjdump tells no registers, stack and local memory: {said.stdout}{said.stderr}")
    return {"registers": int(found["REG"]), "spills": int(found["STACK"]) + int(found["LOCAL"])}


def check(case: Any) -> dict[str, Any]:
    """Compile a case; the line to print, with what is over budget under "error"."""
    from fastsr.kernels.triton_support import SHARED_MEMORY

    try:
        found = compile_case(case)
    except Exception as error:  # any failure of the compiler is a finding about this case, and the next one must still run
        return {"case": case.name, "error": f"{type(error).__name__}: {error}"}
    over = []
    if found["spills"]:
        over.append(f"{found['spills']} bytes spilled; expected none")
    if found["shared"] > SHARED_MEMORY[case.family]:
        over.append(f"{found['shared']} bytes of shared memory; {case.family} has {SHARED_MEMORY[case.family]}")
    if found["absent"]:
        over.append(f"the assembly has no {' and no '.join(found['absent'])}")
    return found | ({"error": "; ".join(over)} if over else {})


def check_nth(wanted: tuple[int, str]) -> dict[str, Any]:
    """The same by the case's number in the list, since kernels do not pickle."""
    return check(selected(wanted[1])[wanted[0]])


@functools.cache
def selected(word: str) -> list[Any]:
    """The cases whose name holds `word`; forked processes find the list made."""
    return [case for case in all_cases() if word in case.name]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="the cases whose name holds WORD")
    word = parser.parse_args().only
    count, failed = len(selected(word)), 0
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for line in pool.imap(check_nth, [(i, word) for i in range(count)]):
            print(json.dumps(line), flush=True)
            failed += "error" in line
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())
