"""`fastsr models`: every known name, with where it is or how to get it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastsr.cli import main
from fastsr.weights import KNOWN


def test_names_paths_and_remedies(capsys):
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(KNOWN)
    assert Path(next(row["path"] for row in rows if row["name"] == "realesrgan-x4plus")).is_file()
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    for row in rows:
        assert row["name"] in printed
        assert (row["path"] or row["get"]) in printed


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_missing_names_every_package(capsys, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    assert "installed: /" not in printed
    for source in KNOWN[name].sources:
        assert f"pip install {source.distribution}" in printed


def test_the_second_source_serves_where_the_first_is_missing(monkeypatch):
    import importlib.util

    known, original = KNOWN["realesrgan-x4plus"], importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == known.sources[0].package else original(name))
    assert known.path() == known.sources[1].path()
