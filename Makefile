# People, hooks and CI all call these targets.
PYTHON ?= python3
SHELL := /bin/bash
UV := .venv-uv/bin/uv
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
COMPILE := pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-annotate

.DEFAULT_GOAL := help
.PHONY: help setup demo airflow mlflow test lint lock lock-check clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup: .venv/.complete ## the locked environment in .venv

.venv/.complete: requirements/all.lock requirements/bootstrap.lock requirements/lint.lock pyproject.toml
	@command -v git > /dev/null || { echo "make setup needs git on PATH." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
		{ echo "Pleat needs Python 3.11 or 3.12: make PYTHON=python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/pip install --quiet --require-hashes -r requirements/bootstrap.lock -r requirements/lint.lock
	$(UV) venv --quiet --allow-existing --python $(PYTHON) .venv
	$(UV) pip sync --quiet --python .venv/bin/python --require-hashes --compile-bytecode requirements/all.lock
	$(UV) pip install --quiet --python .venv/bin/python --no-deps --editable .
	@touch $@

demo: setup ## the whole pipeline on the embedded sample
	dvc repro
	@echo && pleat leaderboard
	@printf '%s\n' '' 'The report is reports/index.html. What you may want next, after `. .venv/bin/activate`:' \
		'  compare runs in MLflow   make mlflow' \
		'  train on your own data   pleat data add FOLDER --name NAME && pleat use sample --set experiment.batches=[NAME] && dvc repro' \
		'  run it from Airflow      make airflow'

airflow: setup ## Airflow on http://127.0.0.1:8080 and MLflow on http://127.0.0.1:5000
	pleat airflow

mlflow: setup ## the MLflow UI on http://127.0.0.1:5000
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_ENABLE_ASSISTANT_SANDBOX=true mlflow server --backend-store-uri sqlite:///mlflow.db \
		--default-artifact-root $(CURDIR)/mlruns --host 127.0.0.1 --port 5000 --workers 1

# Two processes side by side, of about the same length: the tests that start servers and other processes mostly wait, the
# others compute. A server that one part of them has started ends with that part, since an idle Airflow takes its share of
# a core.
SERVERS := tests/test_airflow_celery.py tests/test_airflow_local.py tests/test_airflow_ui.py
MORE_SERVERS := tests/test_airflow_new_data.py $(wildcard tests/test_standalone*.py) tests/test_docker_services.py \
	$(wildcard tests/test_register*.py)

test: setup ## all tests
	@mkdir -p build
	@export GOMP_SPINCOUNT=1000; \
		(pytest $(SERVERS); first=$$?; pytest $(MORE_SERVERS); exit $$((first | $$?))) > build/tests_with_servers.txt 2>&1 & servers=$$!; \
		pytest $(addprefix --ignore=,$(SERVERS) $(MORE_SERVERS)); others=$$?; \
		echo "Waiting for the tests that start servers (build/tests_with_servers.txt)."; \
		wait $$servers; status=$$?; cat build/tests_with_servers.txt; exit $$((others | status))

lint: setup lock-check ## format, lints, types, lock files
	ruff format --check .
	ruff check .
	mypy
	.venv-uv/bin/hadolint --no-color docker/Dockerfile

lock: .venv-uv/bin/uv ## renew requirements/*.lock from pyproject.toml
	$(UV) $(COMPILE) --upgrade --all-extras pyproject.toml -o requirements/all.lock
	cp requirements/all.lock requirements/core.lock  # uv prefers the versions it finds in its output file
	$(UV) $(COMPILE) pyproject.toml -o requirements/core.lock

# A resolution that starts from the pinned versions changes nothing as long as pyproject.toml and the locks agree.
lock-check: .venv-uv/bin/uv
	@mkdir -p .pleat/lock && cp requirements/*.lock .pleat/lock/
	@$(UV) $(COMPILE) --all-extras pyproject.toml -o .pleat/lock/all.lock
	@$(UV) $(COMPILE) pyproject.toml -o .pleat/lock/core.lock
	@diff -rq requirements .pleat/lock && ! grep -hE '^[a-z0-9]' requirements/core.lock | cut -d' ' -f1 | sort -u | \
		comm -23 - <(grep -hE '^[a-z0-9]' requirements/all.lock | cut -d' ' -f1 | sort -u) | grep . || \
		{ echo "pyproject.toml and requirements/*.lock disagree: run 'make lock'." >&2; exit 1; }

.venv-uv/bin/uv:
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/pip install --quiet --require-hashes -r requirements/bootstrap.lock

clean: ## remove the environment and what the pipeline wrote (raw batches and DVC's cache stay)
	rm -rf .venv .venv-uv .pleat reports data/ingest data/validate data/split data/prepare data/train \
		data/evaluate data/profile data/compare data/refit data/compress
