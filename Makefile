# `make serve` and `make test` are all that a fresh machine needs (Python, gcc, make).

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --disable-pip-version-check -q --no-compile
HOST ?= 127.0.0.1
PORT ?= 8000
DEMO ?= $(HOME)/.cache/overcommit/demo
PYTEST_FLAGS ?=
# Test files are shared out to processes; each starts servers, so that four are enough.
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))
# On a machine with a GPU, pip takes the CUDA build of PyTorch; elsewhere the pinned CPU build.
HAS_GPU := $(wildcard /dev/nvidiactl)
CONSTRAINTS := $(if $(HAS_GPU),,-c constraints.txt)
# A server is ten processes: where bytecode must not be written, each would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
SOURCES := $(wildcard runtime/*.c runtime/*.h server/*.c kernels/*.c)

.PHONY: install serve test lint ruff mypy pyright proto js bench bench-memory clean

install: $(VENV)/.installed

# The stamp depends on what decides the environment; Python files are used in place.
$(VENV)/.installed: pyproject.toml constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# PyTorch first and alone: a bare requirement would pull the CUDA packages in.
	$(PIP) $(CONSTRAINTS) torch
	$(PIP) $(CONSTRAINTS) -e '.[dev,bench]'
	$(PIP) --no-deps kserve==0.21.0 || echo "KServe's client cannot be installed: its tests are skipped"
	@# pip would compile 17,000 files on one core.  Some are of another Python's syntax: that is no error.
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true
	touch $@

serve: install
	$(BIN)/overcommit demo $(DEMO)
	$(BIN)/overcommit serve $(DEMO) --host $(HOST) --port $(PORT)

test: install js
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder \
		--cov --cov-report= $(PYTEST_FLAGS)
	$(BIN)/python -m coverage report

lint: install
	@$(MAKE) --no-print-directory -k -j2 -O ruff mypy pyright

ruff: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

mypy: install
	$(BIN)/mypy

pyright: install
	$(BIN)/pyright --pythonpath $(BIN)/python

# A client in another language, where there is npm; without it its test is skipped.
js:
	@if command -v npm >/dev/null && test ! -d tests/conformance/js/node_modules; then \
		npm ci --prefix tests/conformance/js --no-audit --no-fund --ignore-scripts --silent \
		|| echo "npm cannot install the JavaScript client: its test is skipped"; fi

# After a change of server/proto/inference.proto.
proto: install
	$(BIN)/python -m overcommit.server.proto

# How requests are served, and where models are: each in its short form, some ten minutes.
bench: install
	$(BIN)/python -m overcommit.bench serving --quick --json bench/results/$(shell date +%F)-cpu.json \
		--plot bench/results/plots --readme README.md

bench-memory: install
	$(BIN)/python -m overcommit.bench memory --quick \
		--json bench/results/$(shell date +%F)-cpu-memory.json \
		--plot bench/results/plots --readme README.md

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f runtime/*.so server/*.so kernels/*.so .coverage .coverage.*
