"""`make gpu`: steps that crash, hang or fail are recorded and the next one runs; without a GPU it says so and leaves nothing."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastsr.bench.cases.gpu_steps import common
from fastsr.bench.steps import JSON, NOTHING_TO_DO, Step, run_step, run_steps

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")


def python(code: str, name: str = "step", limit: float = 20, **more: object) -> Step:
    """A step that is a line of Python."""
    return Step(name, (sys.executable, "-S", "-c", code, JSON), limit, **more)  # type: ignore[arg-type]


def test_what_a_step_wrote_is_kept_however_it_ends() -> None:
    flush = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('{\"kept\": 1}'); "
    ends = {
        "ok": python(flush),
        "failed": python(flush + "sys.exit('it broke')"),
        "crashed": python(flush + "import os; os.abort()"),
        "timeout": python(flush + "import time; time.sleep(60)", limit=3),  # a busy machine takes long over a start
        "nothing to do": python(flush + f"print('no kernel yet'); sys.exit({NOTHING_TO_DO})"),
    }
    for status, step in ends.items():
        record = run_step(step, step.limit)
        assert record["status"] == status
        assert record["data"] == {"kept": 1}
        assert ("reason" in record) == (status != "ok")
    assert "it broke" in run_step(ends["failed"], 20)["reason"]
    assert run_step(ends["nothing to do"], 20)["reason"] == "no kernel yet"


def test_a_hanging_step_and_its_children_are_killed(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time; time.sleep(1.5); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); time.sleep(60)"
    assert run_step(python(code), 0.7)["status"] == "timeout"
    time.sleep(1.5)
    assert not mark.exists()


def test_success_needs_the_words_that_prove_it() -> None:
    record = run_step(python("print('hello')", must_say=("hello", "ERROR SUMMARY")), 20)
    assert record["status"] == "failed"
    assert "ERROR SUMMARY" in record["reason"]
    assert run_step(Step("absent", ("/no/such/program",), 5), 5)["status"] == "failed"


def test_steps_go_on_and_the_budget_ends_them() -> None:
    kept: dict[str, dict] = {}
    history = []

    def keep(name: str, record: dict) -> None:
        kept[name] = record
        history.append((name, record["status"]))

    steps = [python("import os; os.abort()", "first"), python("pass", "second"), python("pass", "third")]
    times = iter([0.0, 0.0, 10.0, 999.0])
    run_steps(steps, budget=100, keep=keep, say=lambda _: None, clock=lambda: next(times))
    assert {name: record["status"] for name, record in kept.items()} == {"first": "crashed", "second": "ok", "third": "skipped"}
    # A run that is killed during a step leaves a record that says so.
    assert history[:2] == [("first", "running"), ("first", "crashed")]


def load_gpu() -> object:
    spec = importlib.util.spec_from_file_location("fastsr_gpu_command", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_and_leaves_no_file(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    before = set((ROOT / "benchmarks" / "results").glob("*"))
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--json", str(out)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "GPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()
    assert set((ROOT / "benchmarks" / "results").glob("*")) == before


def test_the_whole_command_with_a_faked_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything but the device: steps, the growing JSON, the table, the exit status, and --resume."""
    from fastsr.bench import environment

    gpu = load_gpu()
    runs = tmp_path / "runs"
    once = f"open({str(runs)!r}, 'a').write('x')"
    fakes = [python(once, "good"), python("import os; os.abort()", "bad")]
    monkeypatch.setattr(gpu, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu, "steps", lambda: fakes)
    monkeypatch.setattr(environment, "gpu", lambda: {"name": "NVIDIA Fake"})
    out = tmp_path / "r.json"
    assert gpu.main(["--json", str(out)]) == 1  # type: ignore[attr-defined]
    report = json.loads(out.read_text())
    assert {name: r["status"] for name, r in report["steps"].items()} == {"good": "ok", "bad": "crashed"}
    assert "NVIDIA Fake" in capsys.readouterr().out
    assert gpu.main(["--json", str(out), "--resume"]) == 1  # type: ignore[attr-defined]
    assert runs.read_text() == "x"  # the good step was kept, not run again
    with pytest.raises(SystemExit):
        gpu.main(["--only", "nonsense"])  # type: ignore[attr-defined]


def test_every_step_names_files_that_exist_and_a_distinct_name() -> None:
    steps = load_gpu().steps()  # type: ignore[attr-defined]
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    for step in steps:
        for word in step.command:
            if word.endswith(".py") and word != "setup.py":
                assert Path(word).is_file(), f"{step.name}: {word}"
    assert {f"sanitizer {tool}" for tool in ("memcheck", "racecheck", "initcheck", "synccheck")} <= set(names)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc of the CUDA toolkit")
@pytest.mark.parametrize("probe", ["device_limits", "wgmma", "conv_wgmma", "search_bound"])
def test_probes_compile_for_hopper_without_spills(tmp_path: Path, probe: str) -> None:
    source = ROOT / "benchmarks" / "native" / f"{probe}.cu"
    flags = [*common.PROBE_FLAGS, "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v"]
    done = subprocess.run([str(NVCC), *flags, "-o", str(tmp_path / probe), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill" in line and "0 bytes spill stores, 0 bytes spill loads" not in line]
    assert not spills


def test_step_scripts_import_only_what_exists() -> None:
    """Each script compiles, and every name that it imports from this package is there."""
    import ast

    for path in sorted((ROOT / "benchmarks" / "gpu_steps").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastsr"):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")
