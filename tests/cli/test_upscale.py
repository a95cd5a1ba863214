"""`fastsr upscale` on folders, patterns and bad pictures, and what stays behind when it is stopped."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastsr.cli import main, progress, upscale
from fastsr.upscaling import read_picture
from tests.interrupting import interrupt, start
from tests.weights import files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    return str(files.write_pth(files.network(num_block=1), tmp_path_factory.mktemp("weights") / "model.pth"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures, a file that only looks like one, one that does not, a hidden one and a folder."""
    path = tmp_path / "in"
    (path / "sub").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (6, 5, 3), np.uint8)
    for name in ("a.png", "b.jpg", "d.webp", ".hidden.png", "sub/e.png"):
        Image.fromarray(pixels).save(path / name)
    (path / "c.png").write_text("no picture")
    (path / "notes.txt").write_text("no picture")
    return path


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_a_folder_goes_into_a_folder_and_a_bad_picture_stops_nothing(tmp_path, capsys, weights, folder):
    assert main(["upscale", str(folder), "-o", str(tmp_path / "out"), "-m", weights]) == 1
    assert names(tmp_path / "out") == ["a.png", "b.png", "d.png"]
    printed = capsys.readouterr()
    assert "c.png: cannot be read as a picture" in printed.err
    assert "1 of 4 pictures failed" in printed.err
    assert printed.out.count("5x6 -> 20x24") == 3
    (folder / "c.png").unlink()
    assert main(["upscale", str(folder), "-o", str(tmp_path / "out"), "-m", weights]) == 0
    assert capsys.readouterr().out.count("exists, skipped") == 3


def test_a_pattern_and_a_file_each_once(tmp_path, weights, folder):
    words = [str(folder / "*.jpg"), str(folder / "b.jpg"), str(folder / "**" / "e.png")]
    assert main(["upscale", *words, "-o", str(tmp_path / "out"), "-m", weights, "--format", "same"]) == 0
    assert names(tmp_path / "out") == ["b.jpg", "e.png"]
    assert Image.open(tmp_path / "out" / "b.jpg").format == "JPEG"


@pytest.mark.parametrize(("ending", "kind"), [("jpg", "JPEG"), ("webp", "WEBP"), ("tif", "TIFF")])
def test_formats(tmp_path, weights, folder, ending, kind):
    inputs = [str(folder / name) for name in ("a.png", "b.jpg")]
    assert main(["upscale", *inputs, "-o", str(tmp_path / "out"), "-m", weights, "--format", ending]) == 0
    assert {Image.open(p).format for p in (tmp_path / "out").iterdir()} == {kind}


def test_outscale_and_sixteen_bits(tmp_path, weights):
    from fastsr.upscaling import DeepPicture, write_picture

    pixels = np.random.default_rng(0).integers(0, 65535, (6, 5, 3), np.uint16)
    write_picture(DeepPicture(pixels), tmp_path / "deep.png")
    assert main(["upscale", str(tmp_path / "deep.png"), "-o", str(tmp_path / "o.png"), "-m", weights, "--outscale", "2.5"]) == 0
    result = read_picture(tmp_path / "o.png")
    assert (result.size, result.pixels.dtype) == ((12, 15), np.uint16)
    both = tmp_path / "both.png"
    assert main(["upscale", str(tmp_path / "deep.png"), "-o", str(tmp_path / "p.png"), "-m", weights, "--compare", str(both)]) == 0
    assert Image.open(both).width > 2 * 20


def test_a_small_budget_is_reported_and_kept_to(tmp_path, capsys, weights):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (150, 80, 3), np.uint8)).save(tmp_path / "a.png")
    command = ["upscale", str(tmp_path / "a.png"), "-m", weights, "-o"]
    assert main([*command, str(tmp_path / "whole.png")]) == 0
    assert main([*command, str(tmp_path / "strips.png"), "--memory", "1.2MB"]) == 0
    assert capsys.readouterr().err == ""
    assert (tmp_path / "strips.png").read_bytes() == (tmp_path / "whole.png").read_bytes()
    assert main([*command, str(tmp_path / "tiles.png"), "--memory", "0.9 MB"]) == 0
    assert "80x150 does not fit into 1 MB of memory whole: done in " in capsys.readouterr().err
    assert main([*command, str(tmp_path / "none.png"), "--memory", "10KB"]) == 1
    assert "the smallest tile needs" in capsys.readouterr().err


def test_half_precision_that_overflows_is_done_again(tmp_path, capsys):
    model = files.network(num_block=1)
    with torch.no_grad():
        model.conv_body.weight.mul_(3e5)
        model.conv_last.weight.div_(3e5)
    weights = files.write_pth(model, tmp_path / "m.pth")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 8, 3), np.uint8)).save(tmp_path / "a.png")
    assert main(["upscale", str(tmp_path / "a.png"), "-o", str(tmp_path / "o.png"), "-m", str(weights), "--dtype", "fp16"]) == 0
    assert "NaN or infinity in torch.float16; this picture is done again in torch.bfloat16" in capsys.readouterr().err
    assert np.asarray(Image.open(tmp_path / "o.png")).std() > 0


@pytest.mark.parametrize(
    ("words", "code", "match"),
    [
        (["{in}", "-o", "{in}"], 2, "a.png would be written over itself"),
        (["{in}/a.png", "-o", "{in}/a.png", "--overwrite"], 2, "over itself"),
        (["{in}", "{in}/sub/b.png", "-o", "{out}"], 2, "written to one file"),
        (["{in}/*.bmp", "-o", "{out}"], 1, "no pictures there"),
        (["{in}/sub/none", "-o", "{out}"], 1, "no pictures there"),
        (["{in}/a.png", "-o", "{out}", "--memory", "much"], 2, "'much' is no amount of memory"),
        (["{in}/a.png", "-o", "{out}", "--outscale", "0"], 2, "--outscale is 0"),
    ],
)
def test_mistakes_are_named_before_any_work(tmp_path, capsys, weights, folder, words, code, match):
    (folder / "sub" / "none").mkdir()
    (folder / "sub" / "b.png").write_bytes((folder / "a.png").read_bytes())
    before = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    words = [word.replace("{in}", str(folder)).replace("{out}", str(tmp_path / "out")) for word in words]
    assert main(["upscale", *words, "-m", weights]) == code
    assert match in capsys.readouterr().err
    assert {p: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_amounts_of_memory():
    for text, size in (("1", 1), ("800MB", 8 * 10**8), ("1.5 GB", 15 * 10**8), ("2GiB", 2 << 30), ("3K", 3000), ("7 B", 7)):
        assert upscale.memory(text) == size
    for text in ("", "0", "-1", "1.2.3", "5 parsecs", "nan", "G"):
        with pytest.raises(argparse.ArgumentTypeError, match="800MB"):
            upscale.memory(text)


def test_ctrl_c_leaves_no_partial_file(tmp_path, weights):
    """Stopped while pictures are written, and while the network runs."""
    (tmp_path / "in").mkdir()
    first = tmp_path / "in" / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)).save(first, compress_level=1)
    for k in range(1, 300):  # minutes of work: the signal comes before its end, however late
        os.link(first, first.with_name(f"{k}.png"))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fastsr", "upscale", str(first.parent), "-o", str(out), "-m", weights]
    process = start(command, cwd=ROOT)
    _, message = interrupt(process, when=lambda: list(out.glob("*.png")))
    assert process.returncode == 130, message
    assert message == "fastsr: interrupted\n"
    done = os.listdir(out)
    assert 0 < len(done) < 300
    for name in done:
        assert not name.startswith("."), "a partial file"
        with Image.open(out / name) as picture:
            picture.load()


def test_the_bar_shows_the_time_left(monkeypatch, capsys):
    class Terminal:
        def __init__(self) -> None:
            self.text = ""

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None:
            pass

        def isatty(self) -> bool:
            return True

    terminal, clock = Terminal(), iter(range(100))
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with progress.Bar.open(40) as bar:
        bar.step("a.png", 10, 0.5)  # after a second, an eighth is done
        bar.finish(10)
        bar.step("b.png", 30, 1 / 3)
    assert "12%  0:07 left  a.png" in terminal.text
    assert "50%  0:02 left  b.png" in terminal.text
    assert terminal.text.endswith("\r\x1b[K")
    monkeypatch.undo()
    with progress.Bar.open(40) as bar:  # no terminal: nothing
        bar.step("a.png", 10, 0.5)
    assert capsys.readouterr().err == ""
