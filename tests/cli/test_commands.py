"""The command line: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastsr import backends
from fastsr.cli import main, system
from tests.weights import files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def weights(tmp_path) -> str:
    return str(files.write_pth(files.network(), tmp_path / "model.pth"))


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "in.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 5, 3), np.uint8)).save(path)
    return path


def test_upscale_writes_the_picture(tmp_path, capsys, weights, picture):
    out = tmp_path / "out.png"
    assert main(["upscale", str(picture), "-o", str(out), "-m", weights]) == 0
    assert Image.open(out).size == (20, 24)
    line = capsys.readouterr().out
    assert "5x6 -> 20x24" in line
    assert " s " in line
    assert "MB" in line


def test_options_reach_the_network(tmp_path, weights, picture):
    results = []
    for name, options in (
        ("a", ["--backend", "reference"]),
        ("b", ["--dtype", "bf16", "--backend", "reference"]),
        ("c", ["--threads", "1"]),
    ):
        threads = torch.get_num_threads()
        assert main(["upscale", str(picture), "-o", str(tmp_path / f"{name}.png"), "-m", weights, "--device", "cpu", *options]) == 0
        torch.set_num_threads(threads)
        results.append(np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int))
    assert 0 < np.abs(results[0] - results[1]).max() <= 6
    assert np.abs(results[0] - results[2]).max() <= 1


def test_several_pictures_go_into_a_folder(tmp_path, weights, picture):
    other = tmp_path / "other.jpg"
    Image.open(picture).save(other)
    assert main(["upscale", str(picture), str(other), "-o", str(tmp_path / "results"), "-m", weights]) == 0
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == ["in.png", "other.png"]


def test_compare_writes_both_side_by_side(tmp_path, weights, picture):
    out, both = tmp_path / "out.png", tmp_path / "both.png"
    assert main(["upscale", str(picture), "-o", str(out), "-m", weights, "--compare", str(both)]) == 0
    assert Image.open(both).width > 2 * 20


def test_results_are_kept_unless_asked(tmp_path, capsys, weights, picture):
    out = tmp_path / "out.png"
    out.write_text("mine")
    assert main(["upscale", str(picture), "-o", str(out), "-m", weights]) == 0
    assert "skipped (--overwrite" in capsys.readouterr().out
    assert out.read_text() == "mine"
    assert main(["upscale", str(picture), "-o", str(out), "-m", weights, "--overwrite"]) == 0
    assert Image.open(out).size == (20, 24)


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["{in}", "-o", "{dir}/x.png", "-m", "no-such-weights"], 1, "known: realesrgan-x4plus"),
        (["{in}", "-o", "{dir}/x.png", "-m", "{in}"], 1, "unknown kind of file"),
        (["{dir}/none.png", "-o", "{dir}/x.png", "-m", "{model}"], 1, "none.png: no such file"),
        (["{model}", "-o", "{dir}/x.png", "-m", "{model}"], 1, "cannot be read as a picture"),
        (["{in}", "-o", "{dir}/x.xyz", "-m", "{model}"], 1, "unknown picture format"),
        (["{in}", "-o", "{dir}/no/x.png", "-m", "{model}"], 1, "no such folder"),
        (["{in}", "{model}", "-o", "{in}", "-m", "{model}"], 1, "needs a folder|need a folder"),
        (["{in}", "-o", "{dir}/x.png", "-m", "{model}", "--device", "nonsense"], 1, "nonsense"),
        (["{in}", "{model}", "-o", "{dir}/y", "-m", "{model}", "--compare", "{dir}/c.png"], 2, "--compare takes one"),
        (["{in}", "-o", "{dir}/x.png", "-m", "{model}", "--threads", "0"], 2, "--threads is 0"),
        (["{in}", "-o", "{dir}/x.png", "-m", "{model}", "--dtype", "int8"], 2, "int8"),
        (["{in}", "-m", "{model}"], 2, "--output"),
    ],
)
def test_errors_are_one_clear_line(tmp_path, capsys, weights, picture, arguments, code, match):
    words = [word.replace("{in}", str(picture)).replace("{dir}", str(tmp_path)).replace("{model}", weights) for word in arguments]
    before = sorted(tmp_path.iterdir())
    assert main(["upscale", *words]) == code
    message = capsys.readouterr().err
    assert re.search(match, message), message
    assert "Traceback" not in message
    if code == 1:
        assert message.startswith("fastsr: ")
        assert message.count("\n") == 1
    assert sorted(p for p in tmp_path.iterdir() if p.name != "y") == before


def test_a_missing_backend_is_explained(tmp_path, capsys, monkeypatch, weights, picture):
    monkeypatch.setattr(backends._native, "missing", "it was never built")
    assert main(["upscale", str(picture), "-o", str(tmp_path / "x.png"), "-m", weights, "--device", "cpu", "--backend", "compiled"]) == 1
    assert "it was never built" in capsys.readouterr().err


def test_usage(capsys):
    assert main([]) == 2
    assert main(["nonsense"]) == 2
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("info", "upscale", "models", "bench"))
    assert main(["upscale", "--help"]) == 0
    assert "realesrgan-x4plus" in capsys.readouterr().out


def test_info_tells_what_auto_takes(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__
    rows = {(row["op"], row["device"], row["dtype"]): row for row in found["operators"]}
    for (op, device, dtype), row in rows.items():
        x = torch.empty(1, 8, 4, 4, dtype=getattr(torch, dtype), device=device)
        if op == "conv3x3":  # whose arguments this test knows
            choice = backends.choose(op, "auto", x, x.new_empty(8, 8, 3, 3))
            assert choice in [(entry["backend"], entry["why"]) for entry in (row, *row["for_some_shapes"])]
    assert {op for op, *_ in rows} == set(backends.TABLE)
    assert rows["conv3x3", "cpu", "float64"]["backend"] == "reference"


def test_info_says_why_a_backend_is_out(capsys, monkeypatch):
    monkeypatch.setattr(backends._native, "missing", "it was never built")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "missing: it was never built" in printed
    assert "not on cpu: compiled: the native library is missing" in printed
    assert "conv3x3" in printed


def test_imports_stay_cheap():
    """The package and the command leave torch and everything optional alone until they are needed."""
    code = (
        "import sys, fastsr, fastsr.cli; heavy = {'torch', 'PIL', 'rich', 'triton', 'safetensors', 'numpy'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "fastsr.load, fastsr.upscale, fastsr.ops, fastsr.models;"
        "assert not (heavy - {'torch', 'numpy'}) & set(sys.modules), set(sys.modules) & heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_huge_pages_are_asked_for_before_torch_starts(tmp_path, monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "")
    for offered, expected in (("always madvise [never]\n", None), ("always [madvise] never\n", "1"), ("[always] madvise never\n", "1")):
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
        (tmp_path / "enabled").write_text(offered)
        monkeypatch.setattr(system, "HUGE_PAGES", tmp_path / "enabled")
        system.enable_huge_pages()
        assert system.os.environ.get("THP_MEM_ALLOC_ENABLE") == expected
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
        system.enable_huge_pages()
        assert system.os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    code = "import sys; from fastsr.cli import system, upscale; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout == "False\n"


def test_the_demo_equals_plain_pytorch(tmp_path):
    done = subprocess.run(
        [sys.executable, "examples/demo.py", "--size", "20", "--verify", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20x20 -> 80x80" in done.stdout
    assert Image.open(tmp_path / "upscaled.png").size == (80, 80)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["input.png", "side-by-side.png", "upscaled.png"]
    red, _, blue = np.asarray(Image.open(tmp_path / "upscaled.png")).reshape(-1, 3).mean(0)
    small = np.asarray(Image.open(tmp_path / "input.png")).reshape(-1, 3).mean(0)
    assert abs(red - small[0]) < 6 > abs(blue - small[2])
