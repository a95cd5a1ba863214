"""Finds the cases: the modules `ops/bench_<op>.py` and `models/bench_<network>.py`, each with `cases(options)`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from fastsr.bench import cases as cases_package
from fastsr.bench.case import DTYPES, Case

SUITES = ("ops", "models", "scaling")

#: What "all" stands for: curves take hours and are asked for by name.
ALL = ("ops", "models")


@dataclass(frozen=True)
class Options:
    """Which cases are wanted; a module makes the same list from the same options in every process."""

    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32",)
    sizes: str = "full"  # "quick" is a few small sizes; "tiny" a few pixels, for tools that slow a kernel a hundredfold

    def __post_init__(self) -> None:
        if self.sizes not in ("full", "quick", "tiny"):
            raise ValueError(f"sizes is {self.sizes!r}; expected 'full', 'quick' or 'tiny'")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; expected 'cpu' or 'cuda'")
        if unknown := set(self.dtypes) - set(DTYPES):
            raise ValueError(f"dtype is {sorted(unknown)[0]!r}; expected one of {', '.join(DTYPES)}")

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def available() -> dict[str, str]:
    """Subject -> module, for all case modules that are installed: {"conv3x3": "ops.bench_conv3x3", ...}."""
    found = {}
    for suite in SUITES:
        for folder in cases_package.__path__:
            for path in sorted(Path(folder, suite).glob("bench_*.py")):
                found[path.stem.removeprefix("bench_")] = f"{suite}.{path.stem}"
    return found


def select(names: Sequence[str]) -> list[str]:
    """The modules that subjects, suites or "all" stand for.

    Raises:
        ValueError: a name that is none of these, with the list of what there is.
    """
    found, chosen = available(), []
    for name in names or ("all",):
        matching = [m for subject, m in found.items() if name in (subject, m.split(".")[0]) or (name == "all" and m.split(".")[0] in ALL)]
        if not matching:
            raise ValueError(f"no benchmark is called {name!r}; expected {', '.join((*found, *SUITES, 'all'))}")
        chosen += [m for m in matching if m not in chosen]
    return chosen


def load(module: str) -> ModuleType:
    """Import a case module by its name below `fastsr.bench.cases`, or by the path of a .py file."""
    if not module.endswith(".py"):
        return importlib.import_module(f"{cases_package.__name__}.{module}")
    name = "fastsr_bench_file_" + hashlib.sha1(module.encode()).hexdigest()[:12]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, module)
        if spec is None or spec.loader is None:
            raise ValueError(f"{module} is no Python file")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def cases(module: str, options: Options) -> list[Case]:
    """The cases of a module; their names are unique."""
    made = list(load(module).cases(options))
    names = [case.name for case in made]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{module} has two cases called {sorted(repeated)[0]!r}")
    return made


def find(module: str, name: str, options: Options) -> Case:
    """One case by its name."""
    for case in cases(module, options):
        if case.name == name:
            return case
    raise ValueError(f"{module} has no case called {name!r}")
