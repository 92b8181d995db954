# make serve | test | fuzz | chaos | soak | audit | lint | format | stubs | docs | bench | compat | gpu-check | image | wheels | clean      PYTHON, VENV, CXX and TORCH_INDEX may be set on the command line.
PYTHON ?= python3
VENV ?= .venv
ifeq ($(origin CXX),default)
CXX := c++
endif
CLANGXX ?= clang++
# CPU builds of torch; where it cannot be reached, torch comes from pip's own index.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

INSTALLED := $(VENV)/.installed
DEV_INSTALLED := $(VENV)/.dev-installed
CSRC := $(shell find fptq_runtime/csrc tests/kernels -name '*.h' -o -name '*.cpp' 2>/dev/null)
NATIVE := CMakeLists.txt $(filter fptq_runtime/%,$(CSRC))
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet --quiet
PIP_INSTALL := $(PIP) install --constraint constraints.txt

.PHONY: install serve test fuzz chaos soak audit lint format stubs docs bench compat gpu-check image wheels clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed; $(PYTHON) is older: set PYTHON=")'
	@command -v $(firstword $(CXX)) >/dev/null || { echo "A C++20 compiler is needed and '$(CXX)' is not there (Debian, Ubuntu: apt install g++)." >&2; exit 1; }
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python's venv module is needed (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@echo "Installing into $(VENV): minutes the first time."
	@echo "1 of 3: what the build needs"
	@$(PIP_INSTALL) pip
	@$(PIP_INSTALL) --group build
	@echo "2 of 3: torch, the largest part"
	@$(PIP_INSTALL) --no-deps --retries 1 $(addprefix --extra-index-url ,$(TORCH_INDEX)) torch
	@echo "3 of 3: FPTQ Serve, which is compiled for this machine, and what it needs: minutes without a word"
	@CXX='$(CXX)' $(PIP_INSTALL) --no-build-isolation --editable '.[quantize]'
	@touch $@

$(DEV_INSTALLED): $(INSTALLED)
	@echo "Installing what the tests need."
	@$(PIP_INSTALL) --group dev
	@touch $@

serve: $(INSTALLED)
	@echo "Serving the model that comes with the package; Ctrl-C stops it."
	@$(VENV)/bin/fptq serve demo

test: $(DEV_INSTALLED)
	$(VENV)/bin/python -m pytest

# Two hours: each target of tests/fuzz for FPTQ_FUZZ_SECONDS, then as many random cases as the variables say. With clang++
# the extension is built with sanitizers, and tells what of it was reached.
fuzz: $(DEV_INSTALLED)
	@$(PIP_INSTALL) --group fuzz
	if command -v $(CLANGXX) >/dev/null; then \
	  $(VENV)/bin/cmake -S . -B build/fuzz/native -DCMAKE_CXX_COMPILER=$(CLANGXX) -DCMAKE_BUILD_TYPE=Release \
	    -DPython_EXECUTABLE=$(abspath $(VENV))/bin/python -DFPTQ_SANITIZE=address,undefined,fuzzer-no-link && \
	  $(VENV)/bin/cmake --build build/fuzz/native --target _native && export FPTQ_FUZZ_NATIVE=build/fuzz/native; fi; \
	$(VENV)/bin/python -m tests.fuzz.guided --seconds $${FPTQ_FUZZ_SECONDS:-300}
	FPTQ_FUZZ_SEEDS=$${FPTQ_FUZZ_SEEDS:-8} FPTQ_FUZZ_CASES=$${FPTQ_FUZZ_CASES:-20000} FPTQ_FUZZ_CALLS=$${FPTQ_FUZZ_CALLS:-200000} \
	FPTQ_FUZZ_FIELDS=$${FPTQ_FUZZ_FIELDS:-1000} $(VENV)/bin/python -m pytest tests/fuzz tests/models/test_config_fields.py

# Requests that are cancelled, connections that drop: what `make test` tries a little of.
chaos: $(DEV_INSTALLED)
	FPTQ_CHAOS_CANCELLED=$${FPTQ_CHAOS_CANCELLED:-10000} FPTQ_CHAOS_REQUESTS=$${FPTQ_CHAOS_REQUESTS:-10000} \
	FPTQ_CHAOS_DROPS=$${FPTQ_CHAOS_DROPS:-1000} $(VENV)/bin/python -m pytest --timeout 7200 tests/chaos

# Half an hour on a machine that does nothing else.
soak: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.soak --write docs/operate.md

# Whether a hole is known in any of the versions that are pinned; asks PyPI.
audit: $(INSTALLED)
	@$(PIP_INSTALL) --group audit
	$(VENV)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

lint: $(DEV_INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/clang-format --dry-run --Werror $(CSRC)

format: $(DEV_INSTALLED)
	$(VENV)/bin/clang-format -i $(CSRC)

# What the extension says of itself, for mypy.
stubs: $(INSTALLED)
	$(VENV)/bin/python -m nanobind.stubgen --quiet --module fptq_runtime._native --output-file fptq_runtime/_native.pyi

# The pages as a site, in build/site.
docs: $(DEV_INSTALLED)
	$(VENV)/bin/python docs/build.py build/site

bench: $(INSTALLED)
	$(VENV)/bin/fptq bench demo

# Installs clients of other people beside us and writes what of each works into docs/compatibility.md.
compat: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.compat

gpu-check: $(INSTALLED)
	$(VENV)/bin/python -m benchmarks.gpu_check

image:
	docker build --build-arg TORCH_INDEX=$(TORCH_INDEX) --tag fptq-serve .

# Into dist/, for x86-64 and aarch64, of this Python; a release has those of all (.github/workflows/release.yml).
wheels: $(INSTALLED)
	@echo "Installing a compiler for other machines, 100 MB."
	@$(PIP_INSTALL) --group wheels
	.ci/wheels $(VENV)/bin/python dist

clean:
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
