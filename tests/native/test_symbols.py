"""The library needs nothing but the C and C++ runtimes and libtorch's stable ABI, so one file serves every later torch."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from fastsr import _native

#: The runtimes' symbols carry a version, newer ones of libstdc++ only their std:: name; the linker's own are weak.
ALLOWED = re.compile(
    r"\w+@@?(GLIBC|GLIBCXX|CXXABI|GCC)_[\w.]+"
    r"|_ZN?[KRO]*St\w+"
    r"|_ZTV\w+|_ITM_\w+|__gmon_start__"
    r"|aoti_torch_\w+|torch_\w+"
)


@pytest.fixture(scope="module")
def undefined() -> dict[str, str]:
    """Undefined dynamic symbol -> nm's letter: U, or w where it may stay undefined."""
    if _native.missing:
        pytest.skip(f"the native library is missing: {_native.missing}")
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm of the package binutils")
    text = subprocess.run([nm, "-D", "--undefined-only", str(_native.PATH)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1]: line.split()[-2] for line in text.splitlines()}


def test_no_symbol_outside_the_runtimes_and_the_stable_abi(undefined):
    assert "torch_call_dispatcher" in undefined or "aoti_torch_library_init_def" in undefined, "nm listed nothing of torch"
    assert [name for name in undefined if not ALLOWED.fullmatch(name)] == []


def test_what_only_a_cuda_build_of_torch_has_is_weak(undefined):
    """Else the library would not load beside a CPU build of torch."""
    strong = [name for name, letter in undefined.items() if "cuda" in name and letter == "U" and "device_type" not in name]
    assert strong == []
    if _native.build["cuda"]:
        assert undefined["aoti_torch_get_current_cuda_stream"] == "w"


def test_no_cuda_runtime_is_needed_and_libtorch_is():
    """The CUDA runtime is linked in; a weak symbol resolves only through libtorch.so itself."""
    readelf = shutil.which("readelf")
    if readelf is None or _native.missing:
        pytest.skip("needs readelf of the package binutils" if readelf is None else f"the native library is missing: {_native.missing}")
    text = subprocess.run([readelf, "-d", str(_native.PATH)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", text)
    assert "libtorch.so" in needed
    assert not [name for name in needed if re.match(r"libcuda|libnv|libtorch_cuda|libc10_cuda|libpython", name)]
