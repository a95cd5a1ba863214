"""Truncated, fuzzed and malicious files end in WeightsError: no crash, no code run, no large allocation."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastsr
from fastsr.weights import KNOWN, WeightsError
from tests.weights import files
from tests.weights.test_load import WRITERS

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


def refuse(path, match=".") -> str:
    """The message of the error; Python itself must not have allocated more than the file could justify."""
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=match) as caught:
            fastsr.load(path)
        assert tracemalloc.get_traced_memory()[1] < 64e6
    finally:
        tracemalloc.stop()
    return str(caught.value)


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> dict[str, bytes]:
    """Sound files of a tiny network, by name."""
    folder, model = tmp_path_factory.mktemp("sound"), files.network(num_block=1)
    found = {}
    for name, writer in WRITERS.items():
        path = writer(model, folder / name)
        found[name] = path.read_bytes()
        if name.endswith(".param"):
            found[name.replace("param", "bin")] = path.with_suffix(".bin").read_bytes()
    return found


def place(folder, contents, name, changed) -> object:
    """Write the changed file, with its sound companion where it has one; the path to load."""
    for other in ({name.replace(".bin", ".param"), name.replace(".param", ".bin")} & contents.keys()) - {name}:
        (folder / other).write_bytes(contents[other])
    path = folder / name
    path.write_bytes(changed)
    return path


NAMES = [*WRITERS, "half.bin", "single.bin"]


@pytest.mark.parametrize("name", NAMES)
def test_truncated_anywhere(tmp_path, contents, name):
    whole = contents[name]
    for length in sorted({0, 1, 7, 8, 9, 63, 64, 65, *(len(whole) * k // 12 for k in range(12)), len(whole) - 5}):
        refuse(place(tmp_path, contents, name, whole[:length]))


@pytest.mark.parametrize("name", ["model.safetensors", "half.bin", "single.bin", "half.param"])
def test_longer_than_it_should_be(tmp_path, contents, name):
    refuse(place(tmp_path, contents, name, contents[name] + b"Input x 0 1 y\n"))


@pytest.mark.parametrize("name", NAMES)
@FUZZ
@given(data=st.data())
def test_fuzzed(tmp_path, contents, name, data):
    """Bytes changed at random, most of them where the structure is: a network or a WeightsError, nothing else."""
    changed = bytearray(contents[name])
    last = len(changed) - 1
    where = st.one_of(st.integers(0, min(700, last)), st.integers(0, last), st.integers(max(0, last - 700), last))
    for at, value in data.draw(st.lists(st.tuples(where, st.integers(0, 255)), min_size=1, max_size=6)):
        changed[at] = value
    with contextlib.suppress(WeightsError):
        fastsr.load(place(tmp_path, contents, name, bytes(changed)))


@FUZZ
@given(data=st.binary(max_size=300))
def test_noise(tmp_path, data):
    for head in (b"", b"PK\x03\x04", b"\x80\x02\x8a\x0a", b"7767517\n", struct.pack("<Q", 40) + b"{"):
        path = tmp_path / "noise.dat"
        path.write_bytes(head + data)
        refuse(path)


class Bomb:
    """Leaves a trace if it is ever unpickled."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run(tmp_path, zipped):
    trace = tmp_path / "trace"
    torch.save({"params": Bomb(str(trace))}, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
    assert "mkdir" in refuse(tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Bomb(str(trace)), protocol=2))
    refuse(tmp_path / "plain.pth")
    assert not trace.exists()


def test_whole_modules_and_programs_are_named(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    assert "torch.nn.modules.linear" in refuse(tmp_path / "module.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    assert "list" in refuse(tmp_path / "list.pth")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("a/constants.pkl", b"")
    assert "TorchScript" in refuse(tmp_path / "script.pt")


def repack(source, target, change, compression=zipfile.ZIP_STORED) -> None:
    """Copy a PyTorch archive with its pickle changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith("data.pkl") else data)


def test_a_storage_that_claims_more_than_the_file_has(tmp_path):
    """Without the check torch would read past the end of the record."""
    torch.save({"conv_first.weight": torch.zeros(5)}, tmp_path / "a.pth")
    claimed = lambda data: data.replace(b"K\x05t", b"J\xff\xff\xff\x7ft")  # noqa: E731  a 4-byte integer for a 1-byte one
    repack(tmp_path / "a.pth", tmp_path / "b.pth", claimed)
    assert "claims" in refuse(tmp_path / "b.pth")
    torch.save({"a": torch.zeros(5)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "old.pth").read_bytes()
    changed = whole.replace(b"K\x05Nt", b"J\xff\xff\xff\x7fNt")
    assert changed != whole
    (tmp_path / "old2.pth").write_bytes(changed)
    assert "claim" in refuse(tmp_path / "old2.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_that_reaches_past_its_storage(tmp_path, zipped):
    """torch would enlarge the storage of a plain pickle to hold it."""
    torch.save({"a": torch.zeros(5)}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    further = lambda data: data.replace(b"QK\x00K\x05\x85", b"QK\x00J\xff\xff\xff\x7f\x85")  # noqa: E731
    if zipped:
        repack(tmp_path / "a.pth", tmp_path / "b.pth", further)
    else:
        (tmp_path / "b.pth").write_bytes(further((tmp_path / "a.pth").read_bytes()))
    refuse(tmp_path / "b.pth", "reaches element 2147483647 of a storage of 5")


def test_a_tensor_larger_than_its_storage(tmp_path):
    torch.save({"conv_first.weight": torch.zeros(1).expand(1 << 40)}, tmp_path / "a.pth")
    refuse(tmp_path / "a.pth", "repeats a smaller storage")


def test_compressed_archives(tmp_path):
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "a.pth")
    repack(tmp_path / "a.pth", tmp_path / "b.pth", lambda data: data, zipfile.ZIP_DEFLATED)
    refuse(tmp_path / "b.pth", "compressed")


def header(entries: dict, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (struct.pack("<Q", 1 << 60) + b"{" + b" " * 60, "claims"),
        (struct.pack("<Q", 50) + b"{" + b"[" * 60, "not JSON"),
        (struct.pack("<Q", 100_001) + b'{"a":' + b"[" * 99_996, "not JSON"),
        (struct.pack("<Q", 10_008) + b'{"a":' + b"9" * 10_002 + b"}", "not usable"),
        (header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}, b"abcd"), "does not fit"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"abcdefgh"), "gap"),
        (header({key: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for key in "ab"}, b"abcd"), "overlap"),
        (header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"abcd"), "lacks"),
        (header({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"abcd"), "lacks"),
        (header({"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}, b"abcd"), "F33"),
        (header({"a": 5}), "lacks"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"abcd"), "no known network"),
    ],
)
def test_safetensors_headers(tmp_path, content, match):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    refuse(path, match)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("0=6 1=3", "0=600000000 1=3", "expected 9 \\*"),
        ("0=6 1=3", "0=6 1=5", "expected 3x3"),
        ("2.000000e-01,1.000000e+00", "3.000000e-01,1.000000e+00", "wired"),
        ("-23310=1,2.000000e-01", "-23310=1,1.000000e-01", "wired"),
        ("Interp", "Upsample", "not part of"),
        ("0=1 1=2.000000e+00", "0=2 1=2.000000e+00", "not part of"),
        ("-23301=2,", "1=2 0=1 5=", "broken line|wrong kind|not part"),
        ("Concat concat_3 2 1 b1 b2 b3", "Concat concat_3 2 1 b2 b1 b3", "wired|expected 9"),
        ("convolution_2 1 1 b1", "convolution_2 1 1 b99", "reads the blob"),
        ("Input data 0 1 data", "Input data 0 1 other", "reads the blob"),
        ("9=2 -23310=1,2.000000e-01", "9=2 -23310=2,2.000000e-01", "broken line"),
    ],
)
def test_ncnn_graphs_that_are_no_rrdbnet(tmp_path, old, new, match):
    path = files.write_ncnn(files.network(num_block=1), tmp_path / "net.param")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    refuse(path, match)


def test_other_networks_and_other_weights_for_ncnn(tmp_path):
    known = KNOWN["realesrgan-x4plus"].path()
    other = known.with_name("REALESRGAN_ANIMAVIDEOV3_UP4X.param")
    assert "PReLU" in refuse(other)
    path = files.write_ncnn(files.network(), tmp_path / "net.param")
    data = path.with_suffix(".bin").read_bytes()
    path.with_suffix(".bin").write_bytes(struct.pack("<I", 0x000D4B38) + data[4:])
    refuse(path, "0x000d4b38")
    path.with_suffix(".bin").unlink()
    refuse(path, r"no net\.bin")


def test_state_dicts_that_do_not_fit(tmp_path):
    def saved(change) -> object:
        state = dict(files.network().state_dict())
        change(state)
        torch.save(state, tmp_path / "m.pth")
        return tmp_path / "m.pth"

    refuse(saved(lambda s: s.pop("body.1.rdb2.conv3.bias")), r"lacks body\.1\.rdb2\.conv3\.bias")
    refuse(saved(lambda s: s.update(extra=torch.zeros(1))), "has no extra")
    refuse(saved(lambda s: s.update({"conv_hr.bias": torch.zeros(7)})), r"conv_hr\.bias has shape \(7,\)")
    refuse(saved(lambda s: s.update({"conv_hr.bias": torch.zeros(6, dtype=torch.int64)})), "int64")
    refuse(saved(lambda s: s.update({"conv_first.weight": torch.zeros(10**6, 0, 3, 3)})), "conv_first.weight")
    refuse(saved(lambda s: s.update({"conv_first.weight": torch.zeros(10**6, 1, 1, 1)})), "conv5.weight")
    assert "conv_first" in refuse(saved(lambda s: (s.clear(), s.update(layer=torch.zeros(1)))), "these keys: layer")
