# The project's commands. A fresh clone needs Python 3.11+ and make; everything else is installed into .venv.
#   make serve    install if needed, then serve on 127.0.0.1:8000 until Ctrl-C
#   make test     install if needed, then run all tests
#   make check    style and types
#   make lock     compile the lock files again after a change of pyproject.toml

PYTHON ?= python3
# cpu, or gpu on a machine with an NVIDIA driver.
DEVICE ?= $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
CONFIG ?= serve_config.yaml
# Two files at a time. Tests that start Ray have the machine to themselves.
TWO_FILES := -n 2 --dist loadfile
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(DEVICE)
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# The CPU build of torch stands in PyTorch's own index; pip may also be configured to find it elsewhere.
TORCH_VERSION := 2.13.0
TORCH_CPU := torch==$(TORCH_VERSION)+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help install serve test test-fast check fix lock clean

help:
	@sed -n 's/^#   make/make/p' Makefile

install: $(STAMP)

serve: $(STAMP)
	@PATH="$(CURDIR)/$(BIN):$$PATH" exec $(BIN)/cleave serve $(CONFIG)

test: $(STAMP)
	@$(BIN)/python -m tests.system_setup
	@$(BIN)/python -m tests.node_setup
	$(BIN)/python -m pytest -m "not ray" $(TWO_FILES) $(PYTEST_ARGS) || [ $$? = 5 ]  # 5: none was asked for.
	$(BIN)/python -m pytest -m ray $(PYTEST_ARGS) || [ $$? = 5 ]

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" $(TWO_FILES) $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): requirements/$(DEVICE).lock pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 14); \
		ok or sys.exit("cleave: Python 3.11 to 3.13 is needed, this is %d.%d. Name another: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "cleave: this Python cannot make virtual environments. On Debian: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -c 'import shutil, sys; free = shutil.disk_usage(".").free / 2**30; need = 15 if "$(DEVICE)" == "gpu" else 6; \
		free >= need or sys.exit("cleave: installing needs %d GiB of free disk, here are %.1f." % (need, free))'
	@echo "cleave: installing for $(DEVICE) into $(VENV) (1 to 3 minutes, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if [ $(DEVICE) = cpu ]; then \
		echo "cleave: 1/3 torch, CPU build"; \
		$(PIP) install -q "$(TORCH_CPU)" 2>/dev/null || $(PIP) install -q "$(TORCH_CPU)" --index-url $(TORCH_INDEX); \
	fi
	@echo "cleave: 2/3 pinned packages of requirements/$(DEVICE).lock"
	@$(PIP) install -q --no-deps -r requirements/$(DEVICE).lock
	@echo "cleave: 3/3 cleave itself"
	@$(PIP) install -q --no-deps -e .
	@touch $@
	@echo "cleave: installed."

UV_COMPILE := $(BIN)/uv pip compile --universal --python-version 3.11 --no-header --no-annotate --quiet

lock:
	$(UV_COMPILE) pyproject.toml requirements/cpu.in --extra cpu --extra dev --overrides requirements/overrides.txt \
		--excludes requirements/cpu-excluded.txt --no-emit-package torch -o requirements/cpu.lock
	$(UV_COMPILE) pyproject.toml --extra gpu --extra dev --excludes requirements/gpu-excluded.txt \
		-o requirements/gpu.lock

clean:
	rm -rf $(VENV)
