"""Reports of runs: statistics that hold, a comparison that says what is sure, and pages that show losses first."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest

from fastsr.bench import compare, report, statistics
from fastsr.bench.report import html, markdown, plots, rows
from fastsr.cli import main

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def a_run(**seconds: float) -> dict:
    """A report of one case whose runners take so many seconds, with 1% of noise."""
    noise = random.Random(5)
    found = []
    for runner, time in seconds.items():
        samples = [[time * noise.uniform(0.99, 1.01) for _ in range(8)] for _ in range(4)]
        found.append({
            "suite": "ops", "subject": "conv3x3", "case": "conv3x3 a|b float32", "device": "cpu", "dtype": "float32", "mode": "wall",
            "sizes": {"n": 1}, "flops": 1e9, "bytes": 1e6, "runner": runner.replace("_", " "), "status": "ok", "samples": samples,
            "gate": {"error": 1e-7, "allowed": 1e-6}, "seconds": statistics.summary(samples), "peak_bytes": 1000, "launches": None,
            "faults": {"minor": 1.0, "major": 0.0}, "gflops": 1 / time, "gbytes": 0.001 / time, "roof": None, "speedup": None,
        })  # fmt: skip
    environment = {
        "date": "2026-01-01", "commit": None, "packages": {"torch": "2.13"}, "cpu": {"model": "<fast & small>", "cores": 2}, "gpu": None,
        "threads": 2, "huge_pages": "madvise", "native": {"isa": "avx2", "missing": None},
    }  # fmt: skip
    return {"format": 1, "environment": environment, "settings": {"variables": {}}, "roofs": {"missing": "no compiler"}, "results": found}


def test_the_interval_of_the_median_is_the_binomial_one() -> None:
    """For n = 6, 10 and 20 the textbook's ranks are (1, 6), (2, 9) and (6, 15); fewer than six samples have less than 95%."""
    for n, low, high, confidence in ((1, 1, 1, 0), (3, 1, 3, 0.75), (6, 1, 6, 0.969), (10, 2, 9, 0.979), (20, 6, 15, 0.959)):
        found = statistics.median_interval([float(i) for i in range(1, n + 1)])
        assert found == (low, high, pytest.approx(confidence, abs=5e-4))
    low, high, confidence = statistics.median_interval([float(i) for i in range(1, 3001)])  # 2**3000 is no float
    assert 1440 < low < 1500.5 < high < 1560
    assert 0.95 <= confidence < 0.955


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    noise = random.Random(1)
    held = 0
    for _ in range(500):
        low, high, _ = statistics.median_interval(sorted(noise.expovariate(1.0) for _ in range(15)))
        held += low <= math.log(2) <= high
    assert held >= 0.93 * 500


def test_outliers_are_named_with_their_round() -> None:
    calm = [[1.0, 1.01, 0.99, 1.02], [1.0, 1.01, 9.0, 1.0]]
    assert statistics.outliers(calm) == [{"round": 1, "seconds": 9.0}]
    assert statistics.outliers([[1.0, 2.0, 3.0, 4.0]]) == []


def test_a_comparison_tells_change_from_noise() -> None:
    before = a_run(auto=0.010, slow=0.020, same=0.030, gone=1.0)
    now = a_run(auto=0.008, slow=0.025, same=0.0301, fresh=1.0)
    verdicts = {found["runner"]: found["verdict"] for found in compare.compare(before, now)}
    assert verdicts == {"auto": "faster", "slow": "slower", "same": "same"}
    found = compare.compare(before, now)[0]
    assert found["interval"][0] < found["ratio"] < found["interval"][1]
    assert found["ratio"] == pytest.approx(1.25, rel=0.02)


def test_one_slow_round_is_no_proof() -> None:
    before, now = a_run(auto=0.010), a_run(auto=0.010)
    row = now["results"][0]
    row["samples"][0] = [2 * s for s in row["samples"][0]]
    row["seconds"] = statistics.summary(row["samples"])
    assert compare.compare(before, now)[0]["verdict"] == "same"


def test_what_else_changed_is_said() -> None:
    before, now = a_run(auto=1.0), a_run(auto=1.0)
    assert compare.differences(before, now) == []
    now["environment"]["packages"]["torch"] = "2.14"
    now["environment"]["threads"] = 1
    assert compare.differences(before, now) == ["threads: 2 before, 1 now", "torch: 2.13 before, 2.14 now"]


def test_losses_come_first_and_the_largest_of_them_on_top() -> None:
    run = a_run(auto=0.010, OpenVINO=0.008, **{"eager channels-last": 0.009, "reference": 0.001})
    groups = rows.groups(run["results"]).values()
    assert [rival["runner"] for _, rival in rows.losses(groups)] == ["OpenVINO", "eager channels-last"]
    text = markdown.page({"run": run}, None, [])
    assert text.index("## Where another runner is faster") < text.index("## run")
    assert "| auto | 10." in text
    assert "conv3x3 a\\|b float32" in text


def test_runners_of_two_machines_are_no_rivals() -> None:
    """The slow machine's fastsr is slower than the fast one's OpenVINO: that says nothing about either."""
    slow, fast = a_run(auto=0.010, OpenVINO=0.0115), a_run(auto=0.002, OpenVINO=0.0035)
    text = markdown.page({"slow": slow, "fast": fast}, None, [])
    assert "In none of the cases below." in text
    assert text.count("### conv3x3 a|b float32\n") == 2
    assert text.index("## slow") < text.index("| OpenVINO | 11.") < text.index("## fast") < text.index("| OpenVINO | 3.")
    lost = markdown.page({"slow": a_run(auto=0.010, OpenVINO=0.009), "fast": fast}, None, [])
    assert "| conv3x3 a\\|b float32 | slow | auto |" in lost


def test_readme_shows_the_newest_run_and_says_what_is_lost() -> None:
    spec = importlib.util.spec_from_file_location("fastsr_readme", RESULTS.parent / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    readme = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    old, new = a_run(auto=0.010, **{"eager channels-last": 0.02}), a_run(auto=0.016, OpenVINO=0.008, **{"eager channels-last": 0.02})
    new["environment"]["date"] = "2999-01-01"
    for order in ([old, new], [new, old]):
        newest = readme.newest_of(order)
        text = readme.block(order, newest)
        assert "| 16." in text
        assert "| 10." not in text
        assert "faster in 1 of the 1 measurements" in text
        assert "0.50x OpenVINO" in text
        assert re.search(r"\| OpenVINO \| (7\.9|8\.0)", readme.lost(newest))
    newest = readme.newest_of([old])
    assert "faster in none of the 1 measurements." in readme.block([old], newest)
    assert "In none of the 1 committed measurements" in readme.lost(newest)


def test_curves_and_wide_ratios_are_drawn() -> None:
    pytest.importorskip("matplotlib", reason="needs the package matplotlib")
    run = a_run(auto=0.001, **{"eager channels-last": 0.02})
    for row in run["results"]:
        row["sizes"] = {"axis": "k", "k": 64}
        row["speedup"] = 0.02 / row["seconds"]["median"]
    assert plots.draw({"run": run}).keys() >= {"ratios", "time-against-k", "memory-against-k"}


def test_the_html_page_stands_alone_and_escapes() -> None:
    text = markdown.page({"run": a_run(auto=0.01, rival=0.02)}, None, ["plot.png"])
    page = html.page(text, {"plot": b"picture"})
    assert "&lt;fast &amp; small&gt;" in page
    assert "conv3x3 a|b float32" in page
    assert base64.b64encode(b"picture").decode() in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "<script" not in page


def test_the_committed_results_make_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the package matplotlib")
    files = sorted(RESULTS.glob("cpu-*.json"))
    baseline = str(files[0])
    assert main(["bench", "report", *map(str, files), "--out", str(tmp_path / "out"), "--baseline", baseline]) == 0
    written = {Path(line).name for line in capsys.readouterr().out.split()}
    assert {"report.md", "report.html", "ratios.png"} <= written
    for path in (tmp_path / "out").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    for image in re.findall(r"!\[.*?\]\((.*?)\)", (tmp_path / "out" / "report.md").read_text()):
        assert (tmp_path / "out" / image).exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("not json", "is no JSON file"),
        ("[1, 2]", "is not a file of"),
        ('{"format": 1}', "is not a file of"),
        ('{"steps": {"a": "b"}}', "is not a file of"),
        (None, "No such file"),
    ],
)
def test_files_that_are_no_reports(text: str | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    assert main(["bench", "report", str(path), "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert complaint in shown
    assert str(path) in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("place", "value", "complaint"),
    [
        (("environment", "cpu"), None, "environment.cpu is None; expected an object"),
        (("environment",), [], "environment is []; expected an object"),
        (("settings", "variables"), ..., "settings.variables is missing"),
        (("results",), None, "results is None; expected list"),
        (("results", 0), "row", "results[0] is 'row'; expected an object"),
        (("results", 0, "runner"), ..., "results[0].runner is missing"),
        (("results", 0, "seconds", "median"), "1", "results[0].seconds.median is '1'; expected int or float"),
        (("results", 0, "seconds", "median"), 0, "results[0].samples holds no samples"),
        (("results", 0, "samples"), [[], []], "results[0].samples holds no samples"),
        (("results", 0, "samples"), [["fast"]], "results[0].samples holds no samples"),
        (("results", 0, "seconds"), ..., "results[0].reason is missing"),
        (("roofs",), {"copy": {"value": 3}}, "roofs.copy.unit is missing"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(place: tuple, value: object, complaint: str, tmp_path: Path) -> None:
    """Before anything is measured or written: a baseline is read by the same function."""
    run = a_run(auto=1.0)
    *outer, last = place
    inner = run
    for key in outer:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    path = tmp_path / "run.json"
    path.write_text(json.dumps(run))
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged: {complaint}")):
        report.read(path)


def test_files_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "run.json" for folder in ("a", "b")] + [tmp_path / "a" / "other.json", tmp_path / "a" / "run.json"]
    assert list(report.named(paths)) == ["a-run", "b-run", "other"]


def test_a_page_says_when_nothing_was_timed_or_the_run_was_interrupted() -> None:
    run = a_run(auto=1.0)
    assert "interrupted" not in markdown.page({"run": run}, None, [])
    assert "the run was interrupted" in markdown.page({"run": {**run, "complete": False}}, None, [])
    failed = [{**row, "status": "wrong", "reason": "NaN"} for row in run["results"]]
    for row in failed:
        del row["seconds"]
    text = markdown.page({"run": {**run, "results": failed}}, None, [])
    assert "Nothing was timed." in text
    assert "In none of the cases" not in text


def test_another_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**a_run(auto=1.0), "format": 99}))
    with pytest.raises(ValueError, match="has format 99; this version reads 1"):
        report.read(path)


def test_a_gpu_runs_steps_are_read_as_one_run(tmp_path: Path) -> None:
    first, second = a_run(auto=1.0), a_run(other=1.0)
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"steps": {"build": {"status": "ok"}, "a": {"data": first}, "b": {"data": second}}}))
    assert [row["runner"] for row in report.read(path)["results"]] == ["auto", "other"]
