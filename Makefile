# `make demo`, `make check` and `make test` each work alone on a fresh clone: they build .venv on first use.
PYTHON ?= python3
# Images for the demo, a folder of class folders. Without one it uses a small generated set.
DATA ?= $(wildcard ../shared/data/msld)
BIN := .venv/bin
# Two tests at a time, with a thread each.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo check test types tests fast-tests chromium lower-bounds clean

demo: .venv/demo
	$(BIN)/timm-densese demo $(if $(DATA),--data $(DATA))

# What to run while working: a minute and a half on two cores.
check: .venv/test
	$(BIN)/ruff check .
	@$(MAKE) --no-print-directory --jobs 2 types fast-tests

test: .venv/test
	$(BIN)/ruff check .
	@$(MAKE) --no-print-directory --jobs 2 types tests

# mypy takes most of a minute without its cache, on one core, so the tests run beside it.
types: .venv/test
	$(BIN)/mypy

fast-tests: .venv/test
	$(PYTEST) -m 'not slow'

tests: .venv/test
	$(PYTEST)

# For the page's tests, which are skipped where it is missing.
chromium:
	@if command -v chromedriver; then :; \
	elif command -v apt-get && [ "$$(id -u)" = 0 ]; then \
		apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver; \
	else echo 'Install chromium and chromium-driver: apt-get is missing, or this is not root.'; fi

# A .venv with the oldest versions that pyproject.toml allows.
lower-bounds: clean
	uv venv .venv
	uv pip install --python $(BIN)/python --resolution lowest-direct --editable '.[test]'
	touch .venv/test

clean:
	rm -rf .venv output

# A stamp for each set of extras; a change of pyproject.toml installs again.
.venv/demo .venv/test: .venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(if $(filter test,$*),test,report)]'
	touch $@
