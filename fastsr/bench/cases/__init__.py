"""The benchmark cases: the folders ops, models, peers and native of `benchmarks/`.

A wheel holds them below this package; in a source tree they are found where they lie.
"""

from pathlib import Path

_tree = Path(__file__).resolve().parents[3] / "benchmarks"
if not Path(__file__).with_name("ops").is_dir() and _tree.is_dir():
    __path__.append(str(_tree))
