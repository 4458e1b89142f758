# Every target makes .venv and installs what it needs; nothing else must be on the machine but
# Python 3.11 or later. torch comes first, so that the pinned build is taken and not a newer one.
# The editable install is a path, not an import hook, so that type checkers and editors see it.
PYTHON ?= python3
export OMP_NUM_THREADS ?= 2

.PHONY: train test test-slow bench bench-gpu lint

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -c constraints.txt torch
	.venv/bin/pip install --quiet -c constraints.txt --config-settings editable_mode=compat \
		-e ".[test]"
	touch $@

train: .venv/installed
	.venv/bin/saferl train

test: .venv/installed
	OMP_NUM_THREADS=1 .venv/bin/pytest -n auto -m "not slow"

test-slow: .venv/installed
	.venv/bin/pytest -m slow

bench: .venv/installed
	.venv/bin/python -m benchmarks speed
	.venv/bin/python -m benchmarks scores

bench-gpu: .venv/installed
	.venv/bin/python -m benchmarks speed --device cuda

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
