"""The harness itself: wrong answers are never timed, and no runner can stop the others."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsr.bench import driver, gate, process, results, roofs, suite
from fastsr.bench import worker as worker_module
from fastsr.bench.case import AFFORDABLE_FLOPS, BASELINE, Call, Case, Runner, State
from fastsr.bench.worker import Worker
from tests.bench import fake_cases

ROOT = Path(__file__).resolve().parents[2]
FAKES = str(Path(__file__).with_name("fake_cases.py"))
HONEST = suite.cases(FAKES, suite.Options())[0].runners[BASELINE]


@pytest.fixture(scope="module")
def rows() -> dict[str, dict]:
    """All fake runners in one run, each in its own process."""
    options = suite.Options("cuda" if torch.cuda.is_available() else "cpu")
    settings = driver.Settings(options, threads=1, rounds=2, round_seconds=0.01, build_timeout=60, round_timeout=60)
    case = suite.cases(FAKES, settings.options)[0]
    names = tuple(name for name in case.runners if name != "hanging")
    found = driver.run_case(FAKES, case, driver.Settings(**{**settings.__dict__, "runners": names}))
    return {row["runner"]: row for row in found if row["mode"] in ("", "wall", "cold") and row["status"] != "left out"}


def test_the_honest_runner_is_timed(rows: dict[str, dict]) -> None:
    row = rows[BASELINE]
    assert row["status"] == "ok"
    assert len(row["samples"]) == 2
    assert sum(map(len, row["samples"])) == row["seconds"]["n"]
    s = row["seconds"]
    assert 0 < s["min"] <= s["q1"] <= s["median"] <= s["q3"] <= s["max"]
    assert set(row["faults"]) == {"minor", "major", "preempted"}
    assert row["gate"]["passed"]
    assert row["peak_bytes"] >= 0


ON_A_GPU = ("wrong stream",) if torch.cuda.is_available() else ()


@pytest.mark.parametrize("name", ["wrong", "nan", "cached", "lazy", "late", "no-op", *ON_A_GPU])
def test_a_wrong_answer_is_never_timed(rows: dict[str, dict], name: str) -> None:
    assert rows[name]["status"] == "wrong"
    assert "seconds" not in rows[name]
    assert "samples" not in rows[name]
    assert "output 0" in rows[name]["reason"]


def test_a_runner_that_is_right_on_the_crop_alone_is_never_timed() -> None:
    """Of a case whose float64 is computed on a crop: wrong answers to the crop, to the whole, or from the fourth call on."""
    case = suite.cases(FAKES, suite.Options())[1]
    settings = driver.Settings(threads=1, rounds=2, round_seconds=0.01, build_timeout=60, round_timeout=60)
    names = tuple(name for name in case.runners if "hanging" not in name)
    rows = {row["runner"]: row for row in driver.run_case(FAKES, case, replace(settings, runners=names)) if row["mode"] in ("", "wall")}
    del rows["hanging when large"]
    assert rows.pop(BASELINE)["status"] == "ok"
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(rows, "wrong")
    assert not any("samples" in row for row in rows.values())
    assert "of the crop" in rows["wrong when small"]["reason"]
    assert all("of the crop" not in rows[name]["reason"] for name in ("wrong when large", "nan when large", "half of large", "lazy"))


@pytest.mark.parametrize("mode", ["wall", "warm", "cold"])
def test_no_call_sees_numbers_that_an_earlier_one_saw(tmp_path: Path, mode: str) -> None:
    """Nothing can be answered from memory, by address and version or by content: neither timed calls nor the judgements after."""
    case = suite.cases(FAKES, suite.Options())[1]
    worker = Worker(FAKES, case.name, suite.Options().record(), 1, 0.01)
    worker.truth(str(tmp_path / "truth.pt"), rechecks=2)
    seen, versions, calls = set(), set(), 0
    honest = worker.case.runners[BASELINE].build

    def watched(state: State) -> Call:
        call = honest(state)

        def run(x: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            seen.add(hash(x.contiguous().numpy().tobytes()))
            versions.add((x.data_ptr(), x._version))
            return call(x)

        return run

    worker.case = replace(worker.case, runners={BASELINE: Runner(watched)})
    assert worker.build(BASELINE, str(tmp_path / "truth.pt"))["status"] == "ok"
    for _ in range(3):
        worker._run(worker.sets[0])  # a round begins with a call that is not timed: what it sees may come again
        seen.clear(), versions.clear()
        calls = 0
        worker.round(mode, 40)
        assert calls == 41
        assert len(seen) == len(versions) == 41
        before = set(seen)
        assert worker.recheck(str(tmp_path / "truth.pt"), mode)["status"] == "ok"
        assert len(seen - before) == 1
        worker.rechecks %= 2


def test_shifts_are_those_of_roll_and_none_comes_twice() -> None:
    x, y = torch.arange(60.0).view(2, 1, 5, 6), torch.empty(2, 1, 5, 6)
    found = [tuple(worker_module.shift([5, 6], number)) for number in range(30)]
    assert len(set(found)) == 30
    for shifts in found:
        worker_module.shift_into(y, x, list(zip((2, 3), shifts, strict=True)))
        assert torch.equal(y, torch.roll(x, shifts, (2, 3)))
    assert worker_module.shift([], 3) == []
    assert worker_module.shift([1], 3) == worker_module.shift([0], 3) == [0]


def test_whole_numbers_must_agree_where_the_answer_is_clear() -> None:
    truth, clear = torch.tensor([3, 5, 7]), torch.tensor([True, False, True])
    assert gate.mistakes(torch.tensor([3, 6, 7], dtype=torch.int32), truth, clear) == 0
    assert gate.mistakes(torch.tensor([3, 6, 8]), truth, clear) == 1
    assert gate.mistakes(torch.tensor([3, 6, 8]), truth, None) == 2
    assert gate.mistakes(torch.tensor([3.0, 5.0, 7.0]), truth, clear) == 3


def test_a_runner_that_dies_is_reported_with_its_last_words(rows: dict[str, dict]) -> None:
    assert rows["crashing"]["status"] == "crashed"
    assert "SIGSEGV" in rows["crashing"]["reason"]
    assert "about to die" in rows["crashing"]["reason"]


def test_errors_and_missing_peers_are_told_apart(rows: dict[str, dict]) -> None:
    assert rows["raising"]["status"] == "failed"
    assert rows["raising"]["reason"] == "RuntimeError: no such kernel"
    assert rows["missing"]["status"] == "unavailable"
    assert rows["missing"]["reason"] == "the peer is not installed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: pages are asked for on a CPU")
def test_every_runner_is_measured_with_small_and_with_huge_pages() -> None:
    """The fake "small pages" is wrong where its process may ask for huge ones; who was wrong with small ones is not asked again."""
    case = suite.cases(FAKES, suite.Options())[0]
    settings = driver.Settings(threads=1, rounds=1, round_seconds=0.01, pages=("small", "huge"), runners=(BASELINE, "wrong", "small pages"))
    rows = driver.run_case(FAKES, case, settings)
    left_out = {row["runner"] for row in rows if row["status"] == "left out"}
    assert left_out == case.runners.keys() - {*settings.runners}
    assert [(row["runner"], row["mode"], row["status"]) for row in rows if row["status"] != "left out"] == [
        ("wrong", "", "wrong"),
        *((name, mode, "ok") for mode in ("wall", "warm", "cold") for name in (BASELINE, "small pages")),
        ("small pages", "huge pages", "wrong"),
        (BASELINE, "wall, huge pages", "ok"),
    ]


def test_workers_import_this_package_and_not_what_lies_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fastsr", "select", "json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    worker = process.WorkerProcess(process.environment(1, {}))
    case = suite.cases(FAKES, suite.Options())[0].name
    try:
        opened = worker.tell("open", 60, module=FAKES, case=case, options=suite.Options().record(), threads=1, round_seconds=0.01)
        assert opened["status"] == "ok"
    finally:
        worker.close()
    assert "missing" not in roofs.measure_cpu(1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_its_finished_cases_and_leaves_nobody_behind(tmp_path: Path, number: signal.Signals) -> None:
    """Two cases of which the second hangs: the first is in F.partial, F is as it was, no temporary folder stays."""
    (tmp_path / "r.json").write_text("old")
    script = (
        "import sys\n"
        "from fastsr.bench import command, suite\n"
        f"command.suite.select = lambda names: [{FAKES!r}]\n"
        "from fastsr.cli import main\n"
        f"words = ['bench', 'ops', '--quick', '--rounds', '1', '--runner', {BASELINE!r}, '--runner', 'hanging when large']\n"
        f"sys.exit(main([*words, '--json', {str(tmp_path / 'r.json')!r}, '--device', 'cpu']))\n"
    )
    folder = tmp_path / "temporary"
    folder.mkdir()
    variables = process.environment(1, {"TMPDIR": str(folder)})
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables, text=True) as run:
        until = time.monotonic() + 120
        while not (tmp_path / "r.json.partial").exists():
            assert run.poll() is None, run.stderr and run.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.05)
        run.send_signal(number)
        out, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "r.json.partial" in err
    assert "Traceback" not in err
    assert "scaled_relu 2x3x8x8 float32" in out
    kept = json.loads((tmp_path / "r.json.partial").read_text())
    assert kept["complete"] is False
    assert {row["case"] for row in kept["results"]} == {"scaled_relu 2x3x8x8 float32"}
    assert (tmp_path / "r.json").read_text() == "old"
    assert not list(folder.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, whose signal this is")
def test_workers_end_with_whoever_started_them() -> None:
    """A driver that is killed while a worker is busy leaves nobody behind."""
    script = (
        "import os, sys\n"
        "from fastsr.bench import process, suite\n"
        "worker = process.WorkerProcess(process.environment(1, {}))\n"
        f"case = suite.cases({FAKES!r}, suite.Options())[0].name\n"
        f"worker.tell('open', 60, module={FAKES!r}, case=case, options=suite.Options().record(), threads=1, round_seconds=0.01)\n"
        "print(worker._process.pid, flush=True)\n"
        "worker.tell('build', 600, runner='hanging', truth='')\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=process.environment(1, {})) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        time.sleep(0.5)
        assert Path(f"/proc/{worker}").exists()
        parent.kill()
    until = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
        assert time.monotonic() < until, "the worker goes on"
        time.sleep(0.05)


def test_a_runner_that_hangs_is_given_up() -> None:
    worker = process.WorkerProcess(process.environment(1, {}))
    options = suite.Options()
    case = suite.cases(FAKES, options)[0].name
    try:
        assert worker.tell("open", 60, module=FAKES, case=case, options=options.record(), threads=1, round_seconds=0.01)["status"] == "ok"
        answer = worker.tell("build", 1, runner="hanging", truth="")
        assert answer == {"status": "timeout", "reason": "no answer to 'build' within 1 s"}
        assert worker.tell("round", 1) == answer  # it stays dead
    finally:
        worker.close()


def test_every_row_fits_the_table(rows: dict[str, dict]) -> None:
    rated = results.rate([dict(row) for row in rows.values()], {})
    report = {"environment": driver.environment.record(1), "roofs": {"missing": "no compiler"}, "results": rated}
    text = results.table(report)
    assert "1.00x" in text
    assert "not measured (no compiler)" in text
    for name in rows:
        assert name in text
    plain = results.render("title", results.HEADINGS, [results.cells(row) for row in rated])
    assert "SIGSEGV" in plain


def _case(dtype: str = "float32") -> Case:
    return suite.cases(FAKES, suite.Options(dtypes=(dtype,)))[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gate_allows_twice_eagers_error_and_no_more(tmp_path: Path, dtype: str) -> None:
    case = _case(dtype)
    gate.prepare(case, tmp_path / "truth.pt")
    honest = case.eager(gate.draw_state(case, getattr(torch, dtype)))
    verdict = gate.judge(case, HONEST, honest, tmp_path / "truth.pt")
    assert verdict.passed
    assert verdict.error <= verdict.allowed
    eps = torch.finfo(getattr(torch, dtype)).eps
    # Relative to the largest value, an error of 8 eps is beyond twice eager's (at most half an eps) plus two.
    off = gate.judge(case, HONEST, lambda x: honest(x) + 8 * eps * honest(x).abs().max(), tmp_path / "truth.pt")
    assert not off.passed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_whole_of_a_cropped_case_is_allowed_no_more_than_its_crop(tmp_path: Path, dtype: str) -> None:
    """One element of the whole is off by little more than twice eager's error and two eps; the crop does not show it."""
    case = suite.cases(FAKES, suite.Options(dtypes=(dtype,)))[1]
    gate.prepare(case, tmp_path / "truth.pt")
    low = getattr(torch, dtype)
    honest = case.eager(gate.draw_state(case, low))
    assert gate.judge(case, HONEST, honest, tmp_path / "truth.pt").passed

    def off(x: torch.Tensor, eps: float) -> torch.Tensor:
        y = honest(x)
        assert isinstance(y, torch.Tensor)
        if x.shape[-1] == fake_cases.LARGE:
            y[-1, -1, -1, -1] += eps * y.abs().max()
        return y

    eps = torch.finfo(low).eps
    assert gate.judge(case, HONEST, lambda x: off(x, eps), tmp_path / "truth.pt").passed
    wrong = gate.judge(case, HONEST, lambda x: off(x, 5 * eps), tmp_path / "truth.pt")
    assert not wrong.passed
    assert "crop" not in wrong.reason


def test_dear_cases_have_a_crop_and_affordable_ones_none() -> None:
    """Float64 is never asked for more operations than two cores do in a minute or so."""
    for module in suite.select(["all"]):
        for case in suite.cases(module, suite.Options(dtypes=("float32",))):
            if case.crop is None:
                assert case.flops < 5e12, case.name
            else:
                assert case.flops > AFFORDABLE_FLOPS, case.name


def test_the_gate_sees_a_plane_that_hides_behind_larger_values(tmp_path: Path) -> None:
    """An error far below the tensor's largest value, but large in its own image and channel."""
    truth = torch.ones(1, 2, 4, 4, dtype=torch.float64)
    truth[:, 0] = 10
    y = truth.clone()
    y[0, 1, 0, 0] += 0.1
    assert gate.errors(y, truth, planes=True) == pytest.approx((0.01, 0.1))
    assert gate.errors(y, truth, planes=False) == pytest.approx((0.01, 0.01))


def test_missing_outputs_and_shapes_are_wrong(tmp_path: Path) -> None:
    case = _case()
    gate.prepare(case, tmp_path / "truth.pt")
    assert "2 outputs; expected 1" in gate.judge(case, HONEST, lambda x: (x, x), tmp_path / "truth.pt").reason
    assert "shape" in gate.judge(case, HONEST, lambda x: x[:1], tmp_path / "truth.pt").reason


def test_unknown_names_and_options_say_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"'vgg'.*conv3x3"):
        suite.select(["vgg"])
    with pytest.raises(ValueError, match="device is 'tpu'"):
        suite.Options(device="tpu")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        suite.Options(dtypes=("int8",))
    assert suite.select(["ops", "conv3x3"]).count("ops.bench_conv3x3") == 1


@pytest.mark.parametrize("sizes", ["tiny", "quick", "full"])
def test_shipped_cases_have_distinct_names_a_baseline_and_counted_work(sizes: str) -> None:
    for module in suite.select(["all", "scaling"]):
        made = suite.cases(module, suite.Options(dtypes=("float32", "bfloat16"), sizes=sizes))
        assert made
        for case in made:
            assert BASELINE in case.runners
            assert case.flops > 0
            assert case.bytes > 0


def test_the_counted_work_of_rrdbnet_is_the_known_one() -> None:
    """35.85 MFLOP per pixel of the small image."""
    case = suite.cases("models.bench_rrdbnet", suite.Options())[0]
    assert case.flops / (case.sizes["h"] * case.sizes["w"]) == pytest.approx(35.85e6, rel=1e-3)


def test_tiny_conv3x3_cases_pass_their_own_gate(tmp_path: Path) -> None:
    """Every case's eager runner obeys its own gate, forward and backward, in both layouts."""
    for case in suite.cases("ops.bench_conv3x3", suite.Options(sizes="tiny")):
        gate.prepare(case, tmp_path / "truth.pt")
        for name in (BASELINE, "eager NCHW", "reference"):
            runner = case.runners[name]
            call = runner.build(gate.draw_state(case, torch.float32))
            verdict = gate.judge(case, runner, call, tmp_path / "truth.pt")
            assert verdict.passed, f"{case.name} {name}: {verdict.reason}"


def test_curves_name_their_axis_and_are_no_part_of_all() -> None:
    assert not any(module.startswith("scaling.") for module in suite.select(["all"]))
    made = suite.cases("scaling.bench_scaling", suite.Options(sizes="quick"))
    assert all(case.sizes[case.sizes["axis"]] > 0 for case in made)
    assert {case.sizes["axis"] for case in made} >= {"pixels", "depth", "batch", "threads", "rows", "k", "d"}
    depths = [case.sizes["depth"] for case in suite.cases("scaling.bench_scaling", suite.Options()) if case.sizes["axis"] == "depth"]
    assert max(depths) > 400


def test_floors_name_cases_that_exist() -> None:
    floors = json.loads((ROOT / "benchmarks" / "floors.json").read_text())
    options = suite.Options("cpu", tuple(floors["dtypes"]), "quick")
    cases = {case.name: case for module in suite.select(floors["modules"]) for case in suite.cases(module, options)}
    for name, floor in floors["cases"].items():
        assert {floor["runner"], BASELINE} <= cases[name].runners.keys()
