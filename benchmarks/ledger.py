"""The resource ledger: registers, spills, shared memory and occupancy of every CUDA kernel on every architecture.

    python benchmarks/ledger.py            compile csrc/cuda/*.cu, print the table, write csrc/cuda/ledger.json
    python benchmarks/ledger.py --check    compare instead of writing; exit 1 and print the rows that differ

Needs nvcc, no GPU. Another release of nvcc than the ledger's may place registers otherwise: then only spills and
kernels that cannot launch count as differences.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEDGER = ROOT / "csrc" / "cuda" / "ledger.json"

#: PTX target -> the machine targets that are assembled from it; those of one line share the slow half of the compilation.
TARGETS = {"compute_80": ("sm_80", "sm_86", "sm_89"), "compute_90a": ("sm_90a",), "compute_100a": ("sm_100a",), "compute_120": ("sm_120",)}


@dataclass(frozen=True)
class Limits:
    """One multiprocessor of an architecture (CUDA C++ Programming Guide, "Compute Capabilities"); bytes."""

    threads: int
    blocks: int
    shared: int  # of all blocks together
    shared_per_block: int
    registers: int = 65536


KB = 1024
LIMITS = {
    "sm_80": Limits(2048, 32, 164 * KB, 163 * KB),
    "sm_86": Limits(1536, 16, 100 * KB, 99 * KB),
    "sm_89": Limits(1536, 24, 100 * KB, 99 * KB),
    "sm_90a": Limits(2048, 32, 228 * KB, 227 * KB),
    "sm_100a": Limits(2048, 32, 228 * KB, 227 * KB),
    "sm_120": Limits(1536, 24, 100 * KB, 99 * KB),
}
RESERVED_SHARED = 1024  # taken by the system for each block


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture; sizes in bytes."""

    file: str
    kernel: str
    arch: str
    threads: int  # of a block
    registers: int  # of a thread
    spills: int  # stores and loads
    static_shared: int
    dynamic_shared: int
    blocks: int  # that fit on a multiprocessor at once; 0: the kernel cannot launch
    occupancy: float  # resident threads, as a fraction of the multiprocessor's limit
    limit: str  # what keeps the next block out

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.kernel, self.arch


def _rounded_up(value: int, step: int) -> int:
    return -(-value // step) * step


def occupancy(arch: str, threads: int, registers: int, shared: int) -> tuple[int, float, str]:
    """(blocks on a multiprocessor, fraction of its threads, what limits them) from the architecture's limits."""
    most = LIMITS[arch]
    warps = -(-threads // 32)
    # A warp's registers are handed out in steps of 256, from one of four equal files.
    warps_by_registers = 4 * (most.registers // 4 // _rounded_up(registers * 32, 256))
    fits = {
        "registers": warps_by_registers // warps,
        "shared memory": 0 if shared > most.shared_per_block else most.shared // _rounded_up(shared + RESERVED_SHARED, 128),
        "threads": most.threads // (warps * 32),
        "blocks": most.blocks,
    }
    limit = min(fits, key=fits.__getitem__)
    return fits[limit], round(fits[limit] * warps * 32 / most.threads, 3), limit


def find_nvcc() -> str:
    """nvcc on the PATH or under CUDA_HOME."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    if found is None:
        raise SystemExit("ledger: no nvcc on the PATH or in CUDA_HOME/bin")
    return found


def nvcc_release(nvcc: str) -> str:
    """For example 13.0.88."""
    banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", banner)
    if not found:
        raise SystemExit(f"ledger: {nvcc} --version names no version")
    return found[1]


def compile_file(nvcc: str, source: Path, virtual: str) -> list[Row]:
    """The rows of one source file on the machine targets of one PTX target."""
    from torch.utils.cpp_extension import include_paths

    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-fatbin", "-o", f"{folder}/out.fatbin", "--keep", "--keep-dir", folder, "-std=c++20", "-O3"]
        command += ["--expt-relaxed-constexpr", "-Xptxas", "-v", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'csrc'}"]
        command += [f"-I{path}" for path in include_paths()]
        command += [f"-gencode=arch={virtual},code={machine}" for machine in TARGETS[virtual]]
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"ledger: {source} does not compile for {virtual}:\n{done.stderr[-4000:]}")
        ptx = "\n".join(path.read_text() for path in Path(folder).glob("*.ptx"))
    launches = read_ptx(ptx)
    rows = []
    for mangled, arch, spills, registers, static in read_ptxas(done.stdout + done.stderr):
        if mangled not in launches:  # not for this architecture
            continue
        threads, dynamic = launches[mangled]
        blocks, fraction, limit = occupancy(arch, threads, registers, static + dynamic)
        rows.append(Row(source.name, readable(mangled), arch, threads, registers, spills, static, dynamic, blocks, fraction, limit))
    return rows


def read_ptx(text: str) -> dict[str, tuple[int, int]]:
    """Kernel -> (threads of a block by its launch bounds, dynamic shared memory by the comment of `dynamic_shared`).

    A kernel that has no body for this architecture is left out."""
    found = {}
    for part in re.split(r"(?=\.entry )", text)[1:]:
        name = re.match(r"\.entry (\w+)", part)
        threads = re.search(r"\.maxntid (\d+)", part)
        assert name is not None
        if "// runs on sm_90a alone" in part:
            continue
        if threads is None:
            raise SystemExit(f"ledger: {readable(name[1])} has no __launch_bounds__")
        dynamic = {int(n) for n in re.findall(r"// dynamic shared memory: (\d+) bytes", part)}
        found[name[1]] = int(threads[1]), max(dynamic, default=0)
    return found


def read_ptxas(text: str) -> list[tuple[str, str, int, int, int]]:
    """(kernel, architecture, spilled bytes, registers, static shared memory) of what `ptxas -v` printed."""
    found = []
    for part in text.split("Compiling entry function ")[1:]:
        name, arch = re.match(r"'(\w+)' for '(\w+)'", part).groups()  # type: ignore[union-attr]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        if spills is None or used is None:
            raise SystemExit(f"ledger: ptxas tells neither registers nor spills of {name} for {arch}")
        static = re.search(r"(\d+) bytes smem", part)
        found.append((name, arch, int(spills[1]) + int(spills[2]), int(used[1]), int(static[1]) if static else 0))
    return found


def readable(mangled: str) -> str:
    """The kernel's name and template arguments, without namespaces and parameters."""
    name = subprocess.run(["c++filt", "-p", mangled], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"^void |\b\w+::", "", name)


def measure(nvcc: str) -> list[Row]:
    """All rows, sorted."""
    jobs = [(source, virtual) for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) for virtual in TARGETS]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        parts = list(pool.map(lambda job: compile_file(nvcc, *job), jobs))
    order = list(LIMITS)
    return sorted((row for part in parts for row in part), key=lambda row: (row.file, row.kernel, order.index(row.arch)))


def read_ledger() -> tuple[str, list[Row]]:
    """(nvcc's version, rows) as committed."""
    data = json.loads(LEDGER.read_text())
    return data["nvcc"], [Row(**row) for row in data["rows"]]


def write_ledger(release: str, rows: list[Row]) -> None:
    """One line per row, so that a change shows as one line."""
    lines = ",\n".join("    " + json.dumps(asdict(row)) for row in rows)
    LEDGER.write_text(f'{{\n  "nvcc": "{release}",\n  "rows": [\n{lines}\n  ]\n}}\n')


def table(rows: list[Row]) -> str:
    """The rows as text."""
    head = f"{'kernel':62} {'arch':8} {'thr':>4} {'reg':>4} {'spill':>5} {'shared':>7} {'blk':>3} {'occ':>5}  limit"
    lines = [head]
    for r in rows:
        shared = r.static_shared + r.dynamic_shared
        numbers = f"{r.threads:4} {r.registers:4} {r.spills:5} {shared:7} {r.blocks:3} {r.occupancy:5.0%}"
        lines.append(f"{r.kernel:62} {r.arch:8} {numbers}  {r.limit}")
    return "\n".join(lines)


def differences(release: str, rows: list[Row]) -> list[str]:
    """What is wrong with `rows`, by themselves and against the ledger."""
    found = [f"spills: {row}" for row in rows if row.spills] + [f"cannot launch: {row}" for row in rows if row.blocks == 0]
    recorded_release, recorded = read_ledger()
    if release != recorded_release:
        print(f"ledger: written with nvcc {recorded_release}, this is {release}: comparing spills only")
        return found
    old, new = {row.key: row for row in recorded}, {row.key: row for row in rows}
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            found.append(f"- {old.get(key, 'not in the ledger')}\n+ {new.get(key, 'no such kernel any more')}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Registers, spills, shared memory and occupancy of every CUDA kernel.")
    parser.add_argument("--check", action="store_true", help="compare with csrc/cuda/ledger.json instead of writing it")
    options = parser.parse_args()
    nvcc = find_nvcc()
    release, rows = nvcc_release(nvcc), measure(nvcc)
    if options.check:
        wrong = differences(release, rows)
        print("\n".join(wrong) if wrong else f"ledger: {len(rows)} rows as recorded, no spills")
        return 1 if wrong else 0
    write_ledger(release, rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
