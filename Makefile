# `make demo` and `make test` each work alone on a fresh clone: they build .venv on first use.
PYTHON ?= python3
# Images for the demo, a folder of class folders. Without one it uses a small generated set.
DATA ?= $(wildcard ../shared/data/msld)
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/demo
	$(BIN)/timm-densese demo $(if $(DATA),--data $(DATA))

# Two tests at a time, with a thread each: processes of torch with more threads than cores wait for each other.
test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

clean:
	rm -rf .venv output

# A stamp for each set of extras; a change of pyproject.toml installs again.
.venv/demo .venv/test: .venv/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(if $(filter test,$*),test,report)]'
	touch $@
