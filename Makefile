# make demo   upscale a real photograph x4        make build   compile the native library
# make test   the whole test suite                make lint    style, types, import directions
# make gpu    tests and measurements on a GPU     make ledger  registers and memory of every CUDA kernel
# make peers  pictures against ncnn and spandrel   make report  README's figures from the committed results
# make watch  quick cases against their floors; warns, and fails for a wrong answer alone
#
# Everything is installed into a virtual environment (VENV, default .venv), made on first use.
# `make VENV=path ...` uses one that exists, with whatever torch it holds.

PYTHON ?= python3
VENV ?= .venv
MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export MAX_JOBS

PY := $(VENV)/bin/python
READY := $(VENV)/.fastsr-ready

.PHONY: demo test build lint gpu ledger ledger-check peers report watch soak clean

demo: $(READY)
	$(PY) examples/demo.py

# A worker for each core, at most eight; one that runs out of tests takes some of another's.
test: build
	$(PY) -m pytest tests -n logical --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

# Compiles what changed since the last build; fails where the library is missing in the end.
build: $(READY)
	$(PY) setup.py -q build_ext --inplace
	@$(PY) -c "import sys; from fastsr import _native; sys.exit(f'fastsr: no native library: {_native.missing}' if _native.missing else 0)"

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) .ci/check_imports.py

# Needs no network: it uses the Python and the torch that are there.
gpu:
	$(PYTHON) benchmarks/gpu.py $(GPU_ARGS)

ledger: $(READY)
	$(PY) benchmarks/ledger.py

ledger-check: $(READY)
	$(PY) benchmarks/ledger.py --check

# Other people's packages stay out of the environment: they would bring a torch of their own, and so would an isolated build.
peers: build
	$(PY) -m pip install -q --no-deps --no-build-isolation --target $(VENV)/peers -r tests/peers/requirements.txt
	PYTHONPATH=$(VENV)/peers $(PY) -m pytest tests/peers -rs

# Ten million rows through the compiled code search, each index compared with its true value; goes on where it was.
soak: build
	$(PY) benchmarks/soak_vq.py $(SOAK_ARGS)

$(PY):
	$(PYTHON) .ci/make_venv.py $(VENV)

# The build needs torch beforehand, so it runs without an isolated build environment.
$(READY): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install -q -c constraints.txt torch numpy "setuptools>=77" wheel ninja pybind11
	$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

report: $(READY)
	$(PY) benchmarks/readme.py

watch: build
	$(PY) benchmarks/watch.py

clean:
	rm -rf build dist *.egg-info fastsr/_C.so demo-output
