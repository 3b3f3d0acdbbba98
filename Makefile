# make demo, make test and the rest each work alone on a fresh clone: they create .venv, install what is missing, build
# what changed and run. Needs Python >= 3.10, a C++20 compiler and make.
#
#   PYTHON            the Python that .venv is made from
#   TORCH             the torch to install there, e.g. TORCH="torch==2.13.0"
#   ILVAE_FAST_CUDA   auto, on or off (see CMakeLists.txt)
PYTHON ?= python3
TORCH ?= torch>=2.11,<2.15
PYTEST_OPTIONS ?=

BIN := .venv/bin
# names and versions of the extra docs: the site needs nothing else of this project
DOCS := $(shell sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ,)
SOURCES := CMakeLists.txt $(wildcard cmake/*) setup.py ilvae_fast/_version.py ilvae_fast/operators/fingerprint.py $(shell find csrc -type f)

.PHONY: help demo test sanitize docs lint format build wheel package lowest clean
help:
	@echo "make demo    train VAE, LIDVAE and IL-LIDVAE on digits; report in runs/demo/report.html"
	@echo "make test    all tests"
	@echo "make docs    the documentation site, in build/site; needs no compiler"
	@echo "make sanitize CPU kernels and operators under sanitizers of memory, undefined behaviour and threads"
	@echo "make lint    format, lint and type checks        make format   apply formats"
	@echo "make build   environment and extension alone     make clean    remove what was built"
	@echo "make wheel   a wheel in dist/ for the torch of .venv, which it names and requires"
	@echo "make package sdist and wheel in dist/, each tried in a clean environment"
	@echo "make lowest  tests of the command line with the lowest versions that pyproject.toml allows"

demo: build
	$(BIN)/python examples/demo.py

test: build
	$(BIN)/python -m pytest -n auto --dist worksteal $(PYTEST_OPTIONS)

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

sanitize: build
	$(BIN)/python -m tests.sanitize

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

build: .venv/.built

.venv/.docs: pyproject.toml .venv/.created
	$(BIN)/python -m pip install --quiet $(DOCS)
	@touch $@

# setuptools would pack what an earlier wheel left in build/lib*, files that are gone included
wheel: build
	rm -rf build/lib* build/bdist*
	ILVAE_FAST_PIN_TORCH=1 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

package: build
	rm -rf build/lib* build/bdist*
	$(BIN)/python tests/package.py sdist wheel

lowest: build
	$(BIN)/python tests/lowest.py

.venv/.created:
	$(PYTHON) -m venv .venv
	@touch $@

# What the build itself needs comes first: the extension is compiled against the torch installed here.
.venv/.installed: pyproject.toml .venv/.created
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy pybind11 cmake ninja "setuptools>=77"
	@touch $@

.venv/.built: $(SOURCES) .venv/.installed
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[train,test,interop,docs]"
	@touch $@

clean:
	rm -rf build dist .venv *.egg-info ilvae_fast/_build.json ilvae_fast/*.so
