"""Timers, statistics, roofs and the JSON file; the GPU's timers against a fake device."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastsr.bench import results, roofs, timing
from fastsr.bench.statistics import median, quantile, summary


def test_quantiles_are_linear_between_samples() -> None:
    assert median([3.0, 1.0, 2.0]) == 2.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5
    assert quantile([0.0, 10.0], 0.25) == 2.5
    found = summary([[1.0, 2.0], [3.0, 4.0, 100.0]])
    assert (found["median"], found["min"], found["max"], found["n"]) == (3.0, 1.0, 100.0, 5)
    assert found["round_medians"] == [1.5, 4.0]
    with pytest.raises(ValueError, match="no samples"):
        quantile([], 0.5)


def test_wall_goes_round_the_input_sets() -> None:
    seen, renewed = [], []
    samples = timing.wall(lambda x: seen.append(x), [(1,), (2,), (3,)], 7, renewed.append)  # type: ignore[list-item]
    assert seen == [1, 2, 3, 1, 2, 3, 1]
    assert renewed == [(x,) for x in seen]
    assert len(samples) == 7
    assert min(samples) >= 0


def test_page_faults_and_peak_memory_see_a_large_buffer() -> None:
    size = 64 << 20
    with timing.page_faults() as faults:
        keep = torch.ones(size // 4)
    assert faults["minor"] > 0
    del keep
    if Path("/proc/self/status").exists():
        assert timing.peak_memory(lambda: torch.ones(size // 4), "cpu") >= size // 2


class FakeCuda:
    """Records the order of what is asked of the device; its clock counts the calls made."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.capturing = False
        outer = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = len(outer.log)

            def elapsed_time(self, end: Event) -> float:
                return float(end.at - self.at)

        class Graph:
            def replay(self) -> None:
                outer.log.append("replay")

        class Stream:
            def wait_stream(self, other: object) -> None:
                outer.log.append("wait")

        self.Event, self.CUDAGraph, self.Stream = Event, Graph, Stream
        self._current = Stream()

    def current_stream(self) -> object:
        return self._current

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=1 << 20)

    def synchronize(self) -> None:
        self.log.append("synchronize")

    @contextlib.contextmanager
    def stream(self, stream: object):
        yield

    @contextlib.contextmanager
    def graph(self, graph: object):
        self.capturing = True
        yield
        self.capturing = False


def test_events_bracket_the_call_and_cold_flushes_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    flush = SimpleNamespace(zero_=lambda: cuda.log.append("flush"))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: flush)
    call = lambda x: cuda.log.append(f"call {x}")  # noqa: E731
    renew = lambda inputs: cuda.log.append(f"renew {inputs[0]}")  # noqa: E731
    samples = timing.events(call, [(1,), (2,)], 3, renew, cold=True, cuda=cuda)
    turns = [["flush", f"call {i}", f"renew {i}"] for i in (1, 2, 1)]
    assert cuda.log == [*itertools.chain(*turns), "synchronize"]
    assert samples == [1e-3] * 3  # one thing, the call, lies between the two events
    cuda.log.clear()
    timing.events(call, [(1,), (2,)], 2, renew, cold=False, cuda=cuda)
    assert cuda.log == ["call 1", "renew 1", "call 1", "renew 1", "synchronize"]


def test_a_graph_holds_one_call_for_each_set_and_warms_up_before_capture() -> None:
    cuda = FakeCuda()
    phases = []
    graph = timing.Graph(lambda x: phases.append((cuda.capturing, x)), [(1,), (2,)], cuda)  # type: ignore[list-item]
    assert phases == [(False, 1), (False, 2), (True, 1), (True, 2)]
    assert "synchronize" in cuda.log
    cuda.log.clear()
    assert graph.times(3, lambda: cuda.log.append("renew")) == [1e-3 / 2] * 3  # a replay is two calls
    assert cuda.log == ["replay", *["renew", "replay"] * 3, "synchronize"]  # one to warm up


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.json"
    results.write_json(path, {"a": 1, "inf": float("inf")})
    assert json.loads(path.read_text()) == {"a": 1, "inf": "inf"}
    with pytest.raises(TypeError):
        results.write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] == 1
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_a_target_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for path in ("", str(tmp_path), "/dev/null", str(tmp_path / "file" / "x.json")):
        with pytest.raises(OSError, match="--json is '" if not path else re.escape(str(Path(path).parent))):
            results.Target(path)
    assert Path("/dev/null").is_char_device()


def test_a_result_replaces_an_older_one_only_when_it_is_complete(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("old")
    target = results.Target(str(tmp_path / "r.json"))
    target.keep({"a": 1})
    assert (tmp_path / "r.json").read_text() == "old"
    assert json.loads(target.partial.read_text()) == {"a": 1}
    target.finish()
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}
    assert not target.partial.exists()


def test_rates_take_the_roof_that_binds() -> None:
    roof = {"arithmetic float32": {"value": 100.0, "unit": "GFLOP/s", "how": ""}, "copy": {"value": 10.0, "unit": "GB/s", "how": ""}}
    row = {"runner": "x", "mode": "wall", "dtype": "float32", "seconds": {"median": 0.02}, "flops": 1e9, "bytes": 1e6}
    base = {**row, "runner": "eager channels-last", "seconds": {"median": 0.04}}
    fast, slow = results.rate([dict(row), dict(base)], roof)
    assert fast["roof"]["name"] == "arithmetic float32"
    assert fast["roof"]["percent"] == pytest.approx(50)
    assert fast["gflops"] == pytest.approx(50)
    assert fast["speedup"] == pytest.approx(2)
    assert slow["speedup"] == 1
    [moving] = results.rate([{**row, "bytes": 1e9}], roof)
    assert moving["roof"]["name"] == "copy"
    assert moving["speedup"] is None
    cached = {**roof, "copy in L2": {"value": 40.0, "unit": "GB/s", "how": "", "bytes": 2e8}}
    small = {**row, "flops": 1.0, "bytes": 1e8}
    for mode, moved, name, percent in (("warm", 1e8, "copy in L2", 12.5), ("wall", 1e8, "copy", 50), ("warm", 3e8, "copy", 150)):
        [found] = results.rate([{**small, "mode": mode, "bytes": moved}], cached)
        assert (found["roof"]["name"], found["roof"]["percent"]) == (name, pytest.approx(percent))
    [unknown] = results.rate([{**row, "dtype": "float16"}], roof)
    assert unknown["roof"] is None


def test_roofs_compile_and_are_plausible() -> None:
    """Two measurements of one thread agree within 2x (the best of five counts), and lie where any machine of today lies."""
    first, second = roofs.measure_cpu(1), roofs.measure_cpu(1)
    if "missing" in first:
        pytest.fail(f"the roof probe does not run: {first['missing']}")
    assert {"arithmetic float32", "copy", "copy in L2"} <= first.keys()
    assert first["copy in L2"]["value"] > first["copy"]["value"]
    for name in ("arithmetic float32", "copy", "copy in L2"):
        a, b = first[name]["value"], second[name]["value"]
        assert 1 < a < 1e4, f"{name}: {a} {first[name]['unit']}"
        assert 0.5 < a / b < 2, f"{name}: {a} and {b}"
    best = roofs.better(first, second)
    assert best["copy"]["value"] == max(first["copy"]["value"], second["copy"]["value"])
    assert len(best["copy"]["samples"]) == 2


@pytest.mark.parametrize("missing", ["compiler", "headers"])
def test_without_a_compiler_or_headers_roofs_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str) -> None:
    if missing == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    else:
        monkeypatch.setattr(roofs.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    roofs.compiled.cache_clear()
    found = roofs.measure_cpu(1)
    roofs.compiled.cache_clear()
    assert ("no-such-compiler" if missing == "compiler" else "Python.h") in found["missing"]
