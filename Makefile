# `make` prints all targets.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export PATH := $(abspath $(BIN)):$(PATH)
# make 3.81, which is macOS's, starts simple lines without a shell and looks for programs in the PATH from before;
# not with another shell than /bin/sh.
SHELL  := /bin/bash

.PHONY: help setup demo list tensorboard tables figures claims test test-all test-services lint bench bench-norm bench-step bench-train bench-data

help: ## print this list, in the order in which a new user needs it
	@echo "make TARGET, or make DATASET-BACKBONE-NORM to train, e.g. make cifar-resnet-l2bn ARGS='seed=1'"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 16

setup: $(STAMP) ## make .venv and install; does nothing when it is up to date

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11, 4))' || { \
	  echo 'make: $(VENV) needs pip and Python 3.11.4 or newer; make it anew with another Python:'; \
	  echo '      rm -r $(VENV); make setup PYTHON=python3.12'; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup ## BN against L2BN on handwritten digits: 6 runs, a table and a figure, in 2 minutes on 2 cores
	python scripts/train.py experiment=demo launcher=joblib
	python scripts/report.py tables --runs demo
	python scripts/report.py figures --runs demo --out demo/figures
	@echo "records       demo"
	@echo "curves        make tensorboard LOGDIR=demo"

list: setup ## every data set, backbone with its cost, norm, recipe and experiment, one line each
	@python scripts/list.py

LOGDIR ?= runs
tensorboard: setup ## compare norms in TensorBoard, for the runs in LOGDIR (runs), on this machine alone
	python scripts/report.py tensorboard --runs '$(LOGDIR)'

tables: setup ## results/tables, mechanism.md and the README's block, from results/records and results/studies
	python scripts/report.py tables
	python scripts/report.py mechanism tables

figures: setup ## results/figures, from results/records and results/studies
	python scripts/report.py figures
	python scripts/report.py mechanism figures

claims: setup ## results/claims.md, from results/records
	python scripts/report.py claims

test: setup lint ## lint, types and the fast tests
	python -m pytest --numprocesses auto

test-all: setup lint ## all tests, the long ones too
	python -m pytest --numprocesses auto -m "slow or not slow"

test-services: setup ## the tests with a real Slurm and a browser, which have to be installed
	L2BN_REQUIRE_SERVICES=1 python -m pytest -m services

lint: setup ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

BENCH := python scripts/benchmark.py
MADE  := --json results/benchmarks
bench: bench-norm bench-step bench-train bench-data ## layer, steps, training and data, into results/: hours; on a quiet machine only

bench-norm: setup ## time the layer: BN, the plain composition and the fused kernels side by side
	$(BENCH) norm $(MADE)/norm.json $(ARGS)

bench-step: setup ## time whole training steps with BN and with L2BN, and the first ones in a new process
	$(BENCH) step $(MADE)/step.json $(ARGS)
	$(BENCH) first $(MADE)/first.json

bench-train: setup ## images/s in training and evaluation, beside the plain loop; several runs side by side
	$(BENCH) train $(MADE)/train.json $(ARGS)
	$(BENCH) evaluation $(MADE)/evaluation.json
	$(BENCH) together $(MADE)/together.json

bench-data: setup ## images/s of the data pipelines alone
	$(BENCH) data $(MADE)/data.json $(ARGS)

# make DATASET-BACKBONE-NORM: any names of configs/, and these short ones.
cifar := cifar10
resnet := resnet20
vgg := vgg16
shufflenet := shufflenetv2_x1_0
mobilenet := mobilenetv2_x1_0
part = $(or $($(word $(1),$(subst -, ,$@))),$(word $(1),$(subst -, ,$@)))

# A setting of the run, such as seed=1, would otherwise be a variable of make's that nobody reads.
given = $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))

.DEFAULT:
	@for name in $(given); do case $$name in *[[:lower:]]*) \
		echo "make: give $$name within ARGS, as in ARGS='$$name=...'"; exit 2;; esac; done
	@test $(words $(subst -, ,$@)) = 3 || { echo "make: no target '$@'; type make for a list"; exit 2; }
	@$(MAKE) --no-print-directory setup
	python scripts/train.py dataset=$(call part,1) backbone=$(call part,2) norm=$(call part,3) $(ARGS)
