# Every target can be run first: it installs what is missing (see $(STAMP)).
PYTHON ?= python3
VENV ?= .venv
LOWEST_VENV ?= $(VENV)-lowest
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST_STAMP := $(LOWEST_VENV)/.installed
PROJECTS := LLaVA/pyproject.toml EAGLE/pyproject.toml lmms-eval/pyproject.toml
VLLM_VENV ?= $(VENV)-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
PYTEST ?= -q -n 2 --dist loadfile --no-loadscope-reorder  # two files at a time, each on one thread

# make bench SUITE=... OUT=... BENCH_FLAGS="--only long --rounds 9"
SUITE ?= benchmarks/suites/pocket.json
OUT ?= outputs/bench
BENCH_FLAGS ?=

# the tests that depend most on the version of transformers; LOWEST_TESTS="LLaVA/tests EAGLE/tests" runs all
LOWEST_TESTS ?= LLaVA/tests EAGLE/tests/decode EAGLE/tests/drafts EAGLE/tests/families EAGLE/tests/ge_data/test_qwen.py EAGLE/tests/train/test_overfit.py \
    EAGLE/tests/train/test_positions.py
# whose tests marked slow are run too: every known language model and rotary kind
LOWEST_SLOW ?= EAGLE/tests/families/test_exact_or_refused.py

# the oldest transformers that the packages allow
LOWEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' LLaVA/pyproject.toml)

.PHONY: help setup demo test test-slow test-all test-lowest test-serving bench bench-quick figures quality wheels version clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1\t\2/p' Makefile | expand -t 14

setup: $(STAMP)  ## make the environment and install everything
demo: $(STAMP)  ## decode with the embedded models
	$(BIN)/msd demo

test: $(STAMP)  ## run the core tests (not those marked slow), on the CPU even if there is a GPU
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST)

test-slow: $(STAMP)  ## run the tests marked slow, but those for hand use
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST) -m "slow and not by_hand" --durations=20

test-all: test test-slow  ## run all tests but those for hand use

test-lowest: $(LOWEST_STAMP)  ## run the tests of models with the oldest supported transformers
	OMP_NUM_THREADS=1 $(LOWEST_VENV)/bin/python -m pytest $(PYTEST) $(LOWEST_TESTS)
	OMP_NUM_THREADS=1 $(LOWEST_VENV)/bin/python -m pytest $(PYTEST) -m "slow and not by_hand" $(LOWEST_SLOW)

test-serving: $(STAMP) $(VLLM_STAMP)  ## run the tests of vLLM with an MSD draft, in an environment of their own
	MSD_VLLM_PYTHON=$(VLLM_VENV)/bin/python CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -m by_hand tests/serving

bench: $(STAMP)  ## compare all ways to decode: one table, one plot, one JSON file
	$(BIN)/python -m benchmarks.suite --suite $(SUITE) --out $(OUT) $(BENCH_FLAGS)

bench-quick: $(STAMP)  ## a quick run that only checks that everything works
	$(BIN)/python -m benchmarks.suite --quick --out $(OUT)

figures: $(STAMP)  ## write README's tables and plot, and the figures of docs/method.md
	$(BIN)/python -m benchmarks.readme
	$(BIN)/python -m experiments.figure_inputs
	$(BIN)/python -m experiments.figure_tree

quality: $(STAMP)  ## lint, formatting, dead code, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/vulture
	$(BIN)/mypy

wheels: $(STAMP)  ## build the four wheels into dist/ and list their files
	rm -rf dist $(addsuffix build,$(dir $(PROJECTS))) serving/build
	for folder in $(dir $(PROJECTS)) serving/; do \
	    $(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist "./$$folder" || exit 1; done
	for wheel in dist/*.whl; do echo "$$wheel"; $(BIN)/python -m zipfile -l "$$wheel"; done

version: $(STAMP)  ## write the version of pyproject.toml into the packages
	v="$$(sed -n '/^\[tool\.msd\]/,/^\[/s/^version = "\([^"]*\)".*/\1/p' pyproject.toml)" && \
	sed -i.bak "s/^__version__ = .*/__version__ = \"$$v\"/" \
	    LLaVA/llava/__init__.py EAGLE/eagle/__init__.py lmms-eval/lmms_eval_msd/__init__.py serving/msd_vllm/__init__.py && \
	rm -f LLaVA/llava/__init__.py.bak EAGLE/eagle/__init__.py.bak lmms-eval/lmms_eval_msd/__init__.py.bak \
	    serving/msd_vllm/__init__.py.bak

clean:  ## remove the environments, builds and caches
	rm -rf $(VENV) $(LOWEST_VENV) $(VLLM_VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf dist */build */dist */*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): $(PROJECTS) scripts/1_setup.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" bash scripts/1_setup.sh
	@touch $@

# vLLM pins torch and transformers, so it has an environment of its own. Where it cannot be made, the tests are skipped.
$(VLLM_STAMP): serving/pyproject.toml serving/environment/make.sh serving/environment/torchvision_operators.py
	PYTHON="$(PYTHON)" VENV="$(VLLM_VENV)" bash serving/environment/make.sh

# An environment on top of the first one: only transformers and its dependencies differ.
$(LOWEST_STAMP): $(STAMP)
	rm -rf $(LOWEST_VENV)
	$(BIN)/python -m venv $(LOWEST_VENV)
	base="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && \
	own="$$($(LOWEST_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && \
	echo "import site; site.addsitedir('$$base')" > "$$own/base.pth"
	$(LOWEST_VENV)/bin/python -m pip install "transformers==$(LOWEST)"
	@touch $@
