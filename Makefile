# Everything starts here; each target sets up .venv by itself. `make` lists them.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?=
BIN := .venv/bin
export PYTHON
export KERAS_BACKEND ?= torch
export TF_CPP_MIN_LOG_LEVEL ?= 3
export JUPYTER_PLATFORM_DIRS := 1
# Most of jax's time in tests is compilation: it keeps what it compiled, and in tests/ it optimises little (in notebooks, as for users)
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/_build/jax
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES ?= -1
# A failed step says which target it was and that a rerun is safe.
or_stop = || { echo; echo "✗ make $@ stopped. What went wrong is above; fix it and run 'make $@' again, finished steps are kept."; exit 1; } >&2

.PHONY: help setup wheels site notebooks lint test test-backends test-with-tensorflow test-browser test-all sync benchmark benchmark-inference preview lab hooks clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: .venv/.ready .venv/.ready-library ## create .venv and install everything for development (torch, and jax for training on several devices)
.venv/.ready: pyproject.toml constraints.txt tools/setup.sh
	@MAKE_TARGET="$(firstword $(MAKECMDGOALS))" tools/setup.sh dev torch jax plot
	@touch $@

# The C library, compiled again when its files have changed
.venv/.ready-library: setup.py $(wildcard keras_mml/native/*.[ch]) | .venv/.ready
	@$(BIN)/python setup.py --quiet build_ext --inplace $(or_stop)
	@touch $@

.venv/.ready-backends: .venv/.ready | .venv/.ready-library
	@MAKE_TARGET="$(firstword $(MAKECMDGOALS))" tools/setup.sh dev torch jax plot tensorflow
	@touch $@

site: setup ## build the website into _docs; notebooks whose code is newer than their outputs are executed first
	@$(BIN)/python tools/execute.py $(or_stop)
	@$(BIN)/python tools/build_site.py $(or_stop)

notebooks: setup ## execute all notebooks and save their outputs into nbs/, to be committed
	@$(BIN)/python tools/execute.py --all $(or_stop)
	@$(BIN)/nbdev_clean $(or_stop)

lint: setup ## look for mistakes that can be seen without running anything
	@$(BIN)/ruff check $(or_stop)

# Three rings. The first runs tutorials and long tests short, with fewer epochs and samples; the last runs everything at full length.
short = KERAS_MML_SHORT=1
# Two at a time, with a thread each
nbdev_test = OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print --timing
pytest = $(BIN)/python -m pytest -n 2 --dist worksteal --durations 10
everything = --doctest-modules keras_mml tests
# Without pages where nothing depends on the backend, or that hand their models to a process with torch; run short, without those that tests/ repeats
library = --skip_folder_re '^(tutorials|benchmarks|explanations|how-to|[_.])' --skip_file_re '^($(1)|build|chain|constants|datasets|distribution|export|hdf5|index|kernels|module|packing|runtime|threads|vectors|wasm|command_line|[_.])'
repeated = callbacks|conversion|inspection|recurrent|transformer

test: lint ## run the notebooks, short, the docstring examples and tests/ on torch
	@echo "→ notebooks on torch, short"
	@$(short) $(nbdev_test) $(or_stop)
	@echo "→ docstring examples and tests/ on torch, short, without a browser"
	@$(short) $(pytest) $(everything) -m "not browser" $(or_stop)

# TensorFlow comes last: Keras imports it in every process where it is installed, on any backend, which takes seconds each time
test-backends: test-on-jax test-on-tensorflow test-with-tensorflow ## run what depends on the backend on jax and tensorflow
test-with-tensorflow: .venv/.ready-backends
	@for backend in torch jax; do $(short) KERAS_BACKEND=$$backend $(pytest) tests -m with_tensorflow $(or_stop); done
test-on-jax: setup
test-on-tensorflow: .venv/.ready-backends
test-on-%:
	@echo "→ the library's notebooks on $*, short"
	@$(short) KERAS_BACKEND=$* $(nbdev_test) $(call library,$(repeated)) $(or_stop)
	@echo "→ tests/ on $*, short"
	@$(short) KERAS_BACKEND=$* JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(pytest) tests -m "not any_backend and not browser" $(or_stop)

test-browser: setup ## look at some pages of the site, and run the first tutorial, short, in JupyterLab
	@$(short) $(pytest) tests -m browser $(or_stop)

test-all: lint all-on-torch all-on-jax all-on-tensorflow ## run everything at full length, on all backends, with the site and JupyterLab in a browser
all-on-torch: .venv/.ready-backends
	@KERAS_BACKEND=torch $(nbdev_test) $(or_stop)
	@KERAS_BACKEND=torch $(pytest) $(everything) $(or_stop)
all-on-%: .venv/.ready-backends
	@KERAS_BACKEND=$* $(nbdev_test) $(call library,_) $(or_stop)
	@KERAS_BACKEND=$* $(pytest) $(everything) -m "not any_backend and not browser" $(or_stop)

sync: setup ## regenerate keras_mml/ and README.md from the notebooks, and clean the notebooks
	@$(BIN)/nbdev_export $(or_stop)
	@$(BIN)/python keras_mml/native/build.py nbs/native keras_mml/native $(or_stop)
	@$(MAKE) --no-print-directory .venv/.ready-library
	@$(BIN)/nbdev_clean $(or_stop)
	@$(BIN)/python tools/build_site.py --readme $(or_stop)

# A wheel for each machine, from any machine: what zig calls it, and its tag
WHEELS = x86_64-linux-gnu.2.17=manylinux2014_x86_64.manylinux_2_17_x86_64 aarch64-linux-gnu.2.17=manylinux2014_aarch64.manylinux_2_17_aarch64 \
         x86_64-linux-musl=musllinux_1_2_x86_64 aarch64-linux-musl=musllinux_1_2_aarch64 \
         aarch64-macos.11.0=macosx_11_0_arm64 x86_64-macos.10.13=macosx_10_13_x86_64 x86_64-windows-gnu=win_amd64
wheels: setup ## build the wheels of all platforms into dist/; with FREE_THREADED=python3.14t, also those of such a Python
	@rm -f dist/*.whl
	@for python in $(BIN)/python $(FREE_THREADED); do for machine in $(WHEELS); do \
	    if [[ $$python = *t && $$machine = *windows* ]]; then continue; fi; \
	    echo "→ $${machine#*=}"; rm -rf build; \
	    KERAS_MML_TARGET=$${machine%%=*} KERAS_MML_PLATFORM=$${machine#*=} $$python -m pip wheel --no-build-isolation --no-deps -q -w dist . $(or_stop); \
	done; done
	@$(BIN)/python -m abi3audit --strict --summary dist/*abi3*.whl $(or_stop)
	@for wheel in dist/*linux*.whl; do \
	    $(BIN)/auditwheel show --json "$$wheel" | grep -Eq "overall_tag.*(manylinux_2_17|musllinux_1_2)" || { echo "✗ $$wheel needs more than its name says" >&2; exit 1; }; \
	done
	@! find dist -name '*.whl' ! -name '*win*' -size +225000c | grep . || { echo "✗ larger than 225 kB" >&2; exit 1; }  # Windows' has 35 kB of its C runtime
	@ls -l dist

benchmark-inference: .venv/.ready-benchmark ## measure packed layers against other libraries anew (20 minutes)
	@$(BIN)/python nbs/benchmarks/inference.py $(or_stop)
	@$(BIN)/python nbs/benchmarks/runtime.py $(or_stop)
	@$(BIN)/python nbs/benchmarks/ship.py $(or_stop)
.venv/.ready-benchmark: .venv/.ready-backends
	@MAKE_TARGET="$(firstword $(MAKECMDGOALS))" tools/setup.sh dev torch plot jax tensorflow benchmark
	@touch $@

benchmark: .venv/.ready-backends ## measure accuracy and step times anew (hours; an interrupted run goes on)
	@$(BIN)/python nbs/benchmarks/accuracy.py $(or_stop)
	@$(BIN)/python nbs/benchmarks/step_time.py $(or_stop)
	@$(BIN)/python nbs/benchmarks/recurrence.py $(or_stop)

preview: ## serve the website at http://localhost:8000
	@test -d _docs || $(MAKE) site
	@echo "→ http://localhost:8000 (Ctrl-C stops it)"
	@$(BIN)/python -m http.server --directory _docs --bind 127.0.0.1 8000

lab: setup ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab --notebook-dir=nbs $(LAB_ARGS)

hooks: setup ## install nbdev's git and Jupyter hooks: clean notebooks, mergeable conflicts
	@$(BIN)/nbdev_install_hooks

clean: ## remove everything that was built or installed
	@rm -rf .venv _build _proc _docs .setup.log *.egg-info dist build .pytest_cache .hypothesis
