# The menu for newcomers and contributors. `make` alone prints it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Debian keeps nginx where only root looks for programs.
export PATH := $(PATH):/usr/sbin:/sbin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo serve test faults chaos soak lost fuzz simulate lint format bench bench-engine bench-cold bench-bodies bench-front-ends peers bench-peers overload build lock audit clean nginx wrk

help: ## print this menu
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.demo nginx ## package a real network, serve it behind nginx, show what it sees in two photos
	@$(BIN)/python examples/image_classification/demo.py

serve: $(VENV)/.demo nginx ## the demo, but the server keeps running until Ctrl-C
	@$(BIN)/python examples/image_classification/demo.py --keep

test: $(VENV)/.dev nginx ## run all tests
	@$(BIN)/python -m pytest --numprocesses auto --dist loadfile

faults: $(VENV)/.dev nginx ## run every test of the fault catalogue, slow ones too (15 minutes at most)
	@timeout 15m $(BIN)/python -m pytest -m fault --numprocesses auto --dist loadfile

chaos: $(VENV)/.dev nginx ## kill, stop and change everything under traffic, then count (5 minutes; SECONDS=)
	@$(BIN)/python -m tests.chaos chaos $(if $(SECONDS),--seconds $(SECONDS))

lost: $(VENV)/.dev nginx ## requests lost of 100,000 in swaps, reloads, upgrades and kills (TRIALS=, REQUESTS=)
	@$(BIN)/python -m tests.chaos lost $(TRIALS) $(if $(REQUESTS),--requests $(REQUESTS))

soak: $(VENV)/.dev ## 2,000 registrations beside steady load: does anything grow? (20 minutes; SECONDS=)
	@$(BIN)/python -m tests.chaos soak $(if $(SECONDS),--seconds $(SECONDS))

fuzz: $(VENV)/.dev ## hostile bytes for everything that reads bytes (60 s each; SECONDS=, TARGETS=)
	@$(BIN)/python -m tests.fuzz $(TARGETS) $(if $(SECONDS),--seconds $(SECONDS))

simulate: $(VENV)/.dev ## the dispatcher under a fake clock: SEEDS=100000 runs so many, SEED=n repeats one
	@$(if $(SEEDS),SEEDS=$(SEEDS)) $(if $(SEED),SEED=$(SEED)) $(BIN)/python -m pytest -q -n0 -o timeout=0 tests/unit/test_dispatcher_simulation.py

lint: $(VENV)/.dev ## check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev ## put the code into its house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.dev nginx wrk ## the server against the floor, and against the committed figures (SAVE=1 commits new ones)
	@$(BIN)/python -m benchmarks.hotpath $(if $(SAVE),--save)

bench-engine: $(VENV)/.dev wrk ## what threads, overlap, scheduling and the cache bring, as ratios (ONLY=)
	@$(BIN)/python -m benchmarks.engine $(if $(ONLY),--only $(ONLY))

bench-cold: $(VENV)/.dev nginx wrk ## from the start of the process to the first answer; a new version, live (ONLY=)
	@$(BIN)/python -m benchmarks.coldstart $(if $(ONLY),--only $(ONLY))

bench-front-ends: $(VENV)/.dev wrk ## what a second front end brings where one is the limit
	@$(BIN)/python -m benchmarks.front_ends

bench-bodies: $(VENV)/.dev wrk ## bodies of 100 KiB and 10 MiB, there and back: CPU time and memory (ONLY=)
	@$(BIN)/python -m benchmarks.bodies $(if $(ONLY),--only $(ONLY))

peers: $(VENV)/.dev ## install other servers to compare with, each into an environment of its own (0.6 GB; PEERS=build/peers)
	@$(BIN)/python -m benchmarks.peers --install --peers $(or $(PEERS),build/peers)

bench-peers: $(VENV)/.dev wrk ## the same work behind the servers that `make peers` has installed (12 minutes; PEERS=, ONLY=, AGAINST=)
	@$(BIN)/python -m benchmarks.peers --peers $(or $(PEERS),build/peers) $(if $(ONLY),--only $(ONLY)) $(if $(AGAINST),--against $(AGAINST))

overload: $(VENV)/.dev ## twice and five times the load that a model can serve: who is answered, and how soon (SECONDS=60)
	@$(BIN)/python -m benchmarks.overload $(if $(SECONDS),--seconds $(SECONDS))

build: $(VENV)/.dev ## build the wheel and the source distribution into dist/
	$(BIN)/python -m build

lock: $(VENV)/.audit ## renew requirements.lock: the newest runtime dependencies that fit, with their hashes
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --upgrade --quiet \
	  --custom-compile-command "make lock" --output-file requirements.lock

audit: $(VENV)/.audit ## ask PyPI's advisories about requirements.lock (needs pypi.org itself, not only a mirror)
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock

clean: ## remove what was built, cached and run (keeps the virtual environment)
	rm -rf build dist *.egg-info demo-run model-store .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis fuzz-findings
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

nginx:
	@.ci/get-program nginx nginx

wrk:
	@.ci/get-program wrk wrk

$(VENV)/.made:
	@.ci/check-python $(PYTHON)
	@echo "making a virtual environment in $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.made pyproject.toml setup.cfg
	@echo "installing MMS with PyTorch into $(VENV): several GB when pip has not fetched them before ..."
	@$(BIN)/python -m pip install --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml setup.cfg
	@echo "installing MMS with PyTorch and the developer's tools into $(VENV): several GB when pip has not fetched them before ..."
	@$(BIN)/python -m pip install --editable '.[demo,dev]'
	@touch $(VENV)/.demo $@

$(VENV)/.audit: $(VENV)/.made pyproject.toml setup.cfg
	@$(BIN)/python -m pip install --quiet 'pip-audit>=2.9' 'uv>=0.9'
	@touch $@
