# make demo    the main job: trains on real text, runs a long text under every plan   (README)
# make test    lint, and the tests that prove the package on this machine: minutes     (README)
# make check   all tests: builds, other processors and GPUs, sanitizers, benchmarks     (CI, beside make test)
# make fast    the tests of TESTS alone, stopping at the first failure                  (developers)
# make build   compile csrc again into stable_rnn/, incrementally                      (developers)
# make bench   pytest-benchmark: benchmarks/README.md has the others
# make lint    ruff, mypy and the formatters alone; make format applies these
# make docs    the documentation, in site/
# make wheel   a wheel for other machines, in dist/, and its tests in a fresh environment; make sdist the sources
# make coverage  which lines of stable_rnn/ the tests of TESTS run
#
# Each makes .venv first where it has to: torch (the pinned CPU build), this package in editable mode, built in isolation.
# TESTS="tests/test_cli.py -k doctor" and DEMO="--steps 200" pass arguments on.

PYTHON ?= $(or $(shell command -v python3.11),python3)
TORCH  ?= torch==2.13.0
TESTS  ?= tests
# The CPU build of torch has no use for CUDA kernels; tests compile them all the same. CUDA=auto where torch is built with CUDA.
CUDA   ?= off
DEMO   ?=
WHEEL_TESTS ?= tests/test_cells.py tests/test_functional.py
V      := .venv/bin
# Processes side by side, a file's tests in one of them: what a file builds, it builds once.
PYTEST := $(V)/python -m pytest -n auto --maxprocesses 8 --dist loadfile
CPP    := CMakeLists.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")
# Two makes at once take turns at .venv and build, where the machine has flock.
LOCK   := $(if $(shell command -v flock),flock Makefile)

.PHONY: demo test check fast lint format bench docs wheel sdist coverage build clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(V)/stable-rnn demo $(DEMO)

test: .venv/installed lint
	$(PYTEST) -m "not check" $(TESTS)

# Triton's interpreter is chosen as its kernels are imported: processes of their own.
check: .venv/installed lint
	$(PYTEST) -m check tests
	TRITON_INTERPRET=1 $(PYTEST) tests/triton

fast: .venv/installed
	$(V)/python -m pytest -x -q -m "not check" $(TESTS)

lint: .venv/installed
	$(V)/ruff check .
	$(V)/ruff format --check --quiet . || { echo "make format brings the Python files into form"; exit 1; }
	$(V)/clang-format --dry-run --Werror $(CXX_FILES)
	$(V)/mypy

format: .venv/installed
	$(V)/ruff format .
	$(V)/clang-format -i $(CXX_FILES)

bench: .venv/installed
	$(V)/python -m pytest benchmarks

docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict -d site
	@echo "site/index.html"

# An environment of its own: mkdocs reads the package's sources and imports none of it.
.venv-docs/installed: pyproject.toml
	$(LOCK) sh -ec '[ -x .venv-docs/bin/pip ] || $(PYTHON) -m venv .venv-docs; .venv-docs/bin/pip install --quiet "pip>=25.1"; \
	  .venv-docs/bin/pip install --quiet --group docs; touch $@'

# Repaired by auditwheel, where it is: its name says on which systems it runs. It holds and names no OpenMP library (docs/guide/install.md).
# Then some tests, where nothing but the wheel is installed.
wheel: .venv-wheel/installed
	rm -rf build/wheel dist/*.whl
	STABLE_RNN_CUDA=$(CUDA) $(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	mkdir -p dist; if [ -x .venv-wheel/bin/auditwheel ]; then PATH="$(CURDIR)/.venv-wheel/bin:$$PATH" auditwheel repair -w dist build/wheel/*.whl; \
	  else cp build/wheel/*.whl dist; fi
	$(PYTHON) -m venv build/wheel/fresh
	build/wheel/fresh/bin/pip install --quiet "$(TORCH)" pytest numpy dist/*.whl
	cp -r tests build/wheel/tests; touch build/wheel/pytest.ini   # the wheel is imported, not the sources above
	cd build/wheel && fresh/bin/python -m pytest -q $(WHEEL_TESTS)

sdist: .venv-wheel/installed
	.venv-wheel/bin/python -m build --sdist

.venv-wheel/installed: pyproject.toml
	$(LOCK) sh -ec '[ -x .venv-wheel/bin/pip ] || $(PYTHON) -m venv .venv-wheel; .venv-wheel/bin/pip install --quiet "pip>=25.1"; \
	  .venv-wheel/bin/pip install --quiet --group wheel; touch $@'

coverage: .venv/installed
	$(PYTEST) -m "not check" --cov=stable_rnn --cov-report=term:skip-covered $(TESTS)

# The compiled module is part of the install: newer C++ sources install again (`make build` is the quick way).
.venv/installed: pyproject.toml setup.py $(CPP)
	$(LOCK) sh -ec '[ -x $(V)/pip ] || $(PYTHON) -m venv .venv; $(V)/pip install --quiet "$(TORCH)"; \
	  STABLE_RNN_CUDA=$(CUDA) $(V)/pip install "$(TORCH)" -e ".[demo,test,dev]"; touch $@'

$(V)/cmake:
	$(MAKE) .venv/installed

# Linked in build/ and moved into place, so that a running process never sees half a module.
build: | $(V)/cmake
	$(LOCK) sh -ec '$(V)/cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(V)/ninja -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/build/module \
	  -DSTABLE_RNN_CUDA=$(CUDA) -DPython_EXECUTABLE=$(CURDIR)/$(V)/python -Dpybind11_DIR=$$($(V)/python -m pybind11 --cmakedir); \
	  $(V)/cmake --build build; \
	  for module in build/module/_C*; do cp $$module stable_rnn/new.tmp; mv -f stable_rnn/new.tmp stable_rnn/$${module##*/}; done; \
	  if [ -f .venv/installed ]; then touch .venv/installed; fi'

clean:
	rm -rf build dist demo-out stable_rnn/_C*.so
