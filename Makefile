# make demo: install, then run the main job.  make test: install, then lint, types and tests.
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.installed

.PHONY: install demo test lint types bench clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -c constraints.txt torch==2.13.0
	$(PY) -m pip install --quiet -c constraints.txt -e ".[cpu,dev]"
	touch $(READY)

demo: install
	.venv/bin/gradstore demo

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: install
	.venv/bin/mypy

test: lint types
	$(PY) -m pytest -n 2 --dist worksteal

BENCHMARKS ?= query sketch fidelity drift store search indexes probe_table

bench: install
	for name in $(BENCHMARKS); do $(PY) -m benchmarks.$$name || exit 1; done

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
