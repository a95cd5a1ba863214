"""Builds the native library `fastsr/_C.so` (C++ always, CUDA where nvcc is found); the rest is in pyproject.toml.

Environment: FASTSR_CUDA=0|1 forbids or demands CUDA, TORCH_CUDA_ARCH_LIST picks the architectures,
MAX_JOBS limits parallel compilation. Every decision is printed with its reason.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel  # type: ignore[no-redef]

HERE = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = "0x020b000000000000"  # the stable ABI of torch 2.11: one binary for it and all later ones
OLDEST_NVCC = (12, 4)


def say(message: str) -> None:
    print(f"fastsr: {message}", file=sys.stderr, flush=True)


def find_cuda() -> tuple[Path, tuple[int, int]] | None:
    """The root of nvcc's own toolkit and its version, or None with a printed reason."""
    wanted = os.environ.get("FASTSR_CUDA", "")

    def give_up(reason: str) -> None:
        if wanted == "1":
            raise SystemExit(f"fastsr: FASTSR_CUDA=1, but {reason}")
        say(f"building without CUDA: {reason}")

    if wanted == "0":
        return give_up("FASTSR_CUDA=0")
    nvcc = shutil.which("nvcc")
    if nvcc is None and (home := os.environ.get("CUDA_HOME")):
        nvcc = shutil.which("nvcc", path=str(Path(home) / "bin"))
    if nvcc is None:
        return give_up("no nvcc on the PATH or in CUDA_HOME/bin")
    banner = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.(\d+)", banner)
    if not found:
        return give_up(f"{nvcc} --version names no release")
    version = int(found[1]), int(found[2])
    if version < OLDEST_NVCC:
        return give_up(f"{nvcc} is {found[1]}.{found[2]}; expected {OLDEST_NVCC[0]}.{OLDEST_NVCC[1]} or newer")
    # nvcc may be a wrapper in another folder than its toolkit: only nvcc itself knows where that is.
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
    root = Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent
    if not list(root.glob("**/cuda_runtime.h")):
        return give_up(f"the toolkit of {nvcc} in {root} has no cuda_runtime.h")
    return root, version


def cuda_architectures(version: tuple[int, int]) -> list[str]:
    """The -gencode flags: TORCH_CUDA_ARCH_LIST, else the GPU that is present, else sm_80, sm_90a and PTX."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    reason = "TORCH_CUDA_ARCH_LIST"
    if not listed:
        import torch

        reason = "the GPU that is present"
        capabilities = set()
        if torch.version.cuda and torch.cuda.is_available():
            capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        # Hopper and later have instructions that only the "a" targets hold.
        listed = [f"{a}.{b}{'a' if a >= 9 and (a, b) != (12, 1) else ''}" for a, b in sorted(capabilities) if a >= 8]
    if not listed:
        reason = "no GPU here"
        listed = ["8.0", "9.0a", "9.0+PTX"]
    flags, kept = [], []
    for arch in listed:
        found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if not found:
            raise SystemExit(f"fastsr: TORCH_CUDA_ARCH_LIST has {arch!r}; expected entries like 8.0, 9.0a or 9.0+PTX")
        number = found[1] + found[2] + found[3]
        if int(found[1]) < 8:
            say(f"leaving out {arch}: the kernels need 8.0 or higher")
            continue
        kept.append(arch)
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if found[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        raise SystemExit("fastsr: no architecture of 8.0 or higher is left to build for; set TORCH_CUDA_ARCH_LIST or FASTSR_CUDA=0")
    say(f"CUDA {version[0]}.{version[1]} for {' '.join(kept)} ({reason})")
    return flags


def native() -> dict:
    """The arguments for setup() that build the library; none where there is no compiler."""
    compiler = os.environ.get("CXX", "").split() or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in compiler):
        say("no C++ compiler: installing without the native library (reference and Triton backends only)")
        return {}
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            f"fastsr: building needs torch ({error}). Install torch first, then: pip install --no-build-isolation ."
        ) from error

    import torch

    if torch.version.hip is not None:
        say("building without CUDA: torch was built for ROCm, where the Triton kernels serve")
        cuda = None
    else:
        cuda = find_cuda()
    sources = sorted(glob("csrc/*.cpp") + glob("csrc/common/*.cpp") + glob("csrc/cpu/*.cpp"))
    defines = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION), ("FASTSR_VERSION", f'"{version()}"')]
    flags = {"cxx": ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas"]}
    # libtorch.so must be among the needed libraries: a weak CUDA symbol resolves only through it.
    links, includes, libraries = ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"], [str(HERE / "csrc")], []
    if sys.platform != "linux":
        links = []
    if cuda:
        root, release = cuda
        # A CPU build of torch knows no CUDA_HOME. The CUDA that a CUDA build of torch was made with does not matter, since no
        # CUDA symbol of torch is used: its version check is left out.
        cpp_extension.CUDA_HOME = str(root)
        cpp_extension._check_cuda_version = lambda *_: None
        architectures = cuda_architectures(release)
        sources += sorted(glob("csrc/cuda/*.cu"))
        named = " ".join(re.findall(r",code=(\w+)", " ".join(architectures)))
        defines += [("FASTSR_CUDA_VERSION", f'"{release[0]}.{release[1]}"'), ("FASTSR_CUDA_ARCHS", f'"{named}"')]
        options = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-lineinfo", "-Xptxas", "-warn-spills"]
        flags["nvcc"] = [*options, "-Xcompiler", "-fvisibility=hidden", *architectures]
        static = sorted(root.glob("**/libcudart_static.a"))
        if not static:
            raise SystemExit(f"fastsr: no libcudart_static.a under {root}; install it or set FASTSR_CUDA=0")
        includes += sorted({str(p.parent) for p in root.glob("**/include/cuda_runtime.h")})
        links += [str(static[0]), "-ldl", "-lrt", "-lpthread"]

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            # One folder for object files, whoever starts the build: a second build compiles only what changed.
            self.build_temp = self.build_temp or str(HERE / "build" / "native")
            super().finalize_options()

        def get_ext_filename(self, name: str) -> str:
            return str(Path(*name.split("."))) + ".so"  # no Python in it: one file for every Python

    extension = cpp_extension.CppExtension(
        "fastsr._C",
        sources,
        include_dirs=includes,
        define_macros=defines,
        extra_compile_args=flags,
        extra_link_args=links,
        libraries=libraries,
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)),
    )
    say(f"building the native library with {len(sources)} sources")
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


def version() -> str:
    text = (HERE / "fastsr" / "_version.py").read_text()
    return re.search(r'__version__ = "(.+)"', text)[1]  # type: ignore[index]


class Wheel(bdist_wheel):
    """`py3-none-<platform>`: the library uses neither Python's ABI nor a certain torch's."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


# The benchmark cases lie in benchmarks/ and are installed below fastsr.bench.cases.
CASES = {f"fastsr.bench.cases.{folder}": f"benchmarks/{folder}" for folder in ("ops", "models", "scaling", "peers", "native")}

os.chdir(HERE)
arguments = native() if not {"egg_info", "sdist", "dist_info", "--version", "clean"} & set(sys.argv[1:]) else {}
arguments.setdefault("cmdclass", {})["bdist_wheel"] = Wheel
setup(packages=[*find_packages(include=["fastsr", "fastsr.*"]), *CASES], package_dir=CASES, **arguments)
