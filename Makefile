# Every target makes what it needs: a .venv with plain pip, from the pinned constraints file.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STEPS ?=
SEED ?= 0
KILLS ?= 50
WORK ?= runs/ablation

.PHONY: help install quickstart test test-all test-gpu lint bench bench-gpu drill drill-hosts drill-slurm ablation clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## .venv with the package, its extras dev and quickstart, pinned

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
	@# torch first and by itself: with it in place nothing below asks for another build of it.
	$(BIN)/python -m pip install -q -c constraints.txt torch torchvision
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,quickstart]'
	touch $@

quickstart: install ## pages rendered, six runs trained on 2 ranks, report over them (STEPS=… shortens it; SEED=… OUT=folder)
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/quickstart.sh $(if $(STEPS),STEPS=$(STEPS)) SEED=$(SEED) $(if $(OUT),OUT=$(OUT))

test: install lint ## lint, types, rooms, and the fast tests: what CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not gpu' --durations=10

test-all: install lint ## all tests, also the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=20

test-gpu: install ## what only a GPU can show, about 8 minutes; skipped by name without one
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu -m gpu -rs -s --durations=10

lint: install ## ruff, mypy --strict, import-linter; shellcheck if it is installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@if command -v shellcheck >/dev/null; then shellcheck -x -P SCRIPTDIR launch/*.sh; else echo "shellcheck is not installed: left out"; fi

$(VENV)/peers/.installed: benchmarks/loader/peers.txt
	$(PYTHON) -m venv $(VENV)/peers
	$(VENV)/peers/bin/python -m pip install -q -r $<
	touch $@

bench: install $(VENV)/peers/.installed ## benchmarks into benchmarks/results, about an hour on two cores
	$(BIN)/python -m benchmarks.masked_vs_full --out benchmarks/results/masked_vs_full.json
	$(BIN)/python -m benchmarks.masked_vs_full --out benchmarks/results/masked_vs_full_vit_base.json \
		--backbone timm/vit_base_patch16_224 --batch 1 --keep 0.3
	$(BIN)/python -m benchmarks.masked_vs_full --out benchmarks/results/masked_vs_full_bfloat16.json \
		--backbone transformers/segformer-b2 --dtype bfloat16 --keep 0.3
	$(BIN)/python -m benchmarks.train_step --out benchmarks/results/train_step.json
	$(BIN)/python -m benchmarks.launches --out benchmarks/results/launches.json
	$(BIN)/python -m benchmarks.engine_overhead --out benchmarks/results/engine_overhead.json
	$(BIN)/python -m benchmarks.building --out benchmarks/results/building.json
	$(BIN)/python -m benchmarks.loader --out benchmarks/results/loader.json --other-python $(VENV)/peers/bin/python
	$(BIN)/python -m benchmarks.scale --out benchmarks/results/scale.json
	$(BIN)/python -m benchmarks.plan_vs_measured --out benchmarks/results/plan_vs_measured.json
	$(BIN)/python -m benchmarks.planned_recipes && $(BIN)/python -m benchmarks.planned_recipes --heads
	$(BIN)/python -m benchmarks.scaling_model --out benchmarks/results/scaling_model.json
	$(BIN)/python -m benchmarks.scaling_model --out benchmarks/results/scaling_model.json --doc docs/scaling.md

bench-gpu: install ## masked_vs_full, train_step, engine_overhead on a GPU into benchmarks/results/gpu, 16 minutes
	$(BIN)/python -m benchmarks.gpu --out benchmarks/results/gpu --minutes 16

drill: install ## runs killed, stopped, moved, damaged and cut off, into benchmarks/results, over 40 minutes (KILLS=50, SEED=…)
	$(BIN)/python -m benchmarks.drill --out benchmarks/results/drill.json --kills $(KILLS) --seed $(SEED)

drill-hosts: install ## runs over two hosts of namespaces, one cut off, slow links, into benchmarks/results, 40 minutes (root)
	$(BIN)/python -m benchmarks.drill_hosts --out benchmarks/results/drill_hosts.json

drill-slurm: install ## jobs of a small slurm of its own signalled, requeued, out of time, into benchmarks/results, 10 minutes
	$(BIN)/python -m benchmarks.drill_hosts.slurm --out benchmarks/results/drill_slurm.json

ABLATION = --task camvid --data $(DATA) --weights $(WEIGHTS) --arms $(ARMS)
ARMS ?= supervised fixmatch maskmatch
ablation: install ## arms × 5 draws on CamVid, hours, into WORK (DATA=shards WEIGHTS=vit_s.pt; ARMS, WORK)
	test -f $(WORK)/costs.json || $(BIN)/python -m benchmarks.ablation.cost $(ABLATION) --out $(WORK)/costs.json
	$(BIN)/python -m benchmarks.ablation $(ABLATION) --steps 1500 --jobs $$(nproc) --work $(WORK) \
		--cost $(WORK)/costs.json --out $(WORK)/ablation.json

clean: ## what the other targets made, but not runs and data
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
