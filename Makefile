# make demo: install, then run the main job.  make test: install, then lint, types and tests.
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.installed

.PHONY: install browser demo test lint types bench clean

install: $(READY)

$(READY): pyproject.toml constraints.txt gradstore/_encode.c
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -c constraints.txt torch==2.13.0
	$(PY) -m pip install --quiet -c constraints.txt -e ".[cpu,dev]"
	touch $(READY)

# The report's and the explorer's tests open them in a browser.
browser:
	command -v chromium > /dev/null || { \
	  sudo=$$(test "$$(id -u)" = 0 || echo sudo -n); \
	  $$sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; \
	} || echo "no chromium and none could be installed: the tests that need it will fail" >&2

demo: install
	.venv/bin/gradstore demo

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: install
	.venv/bin/mypy

test: lint types browser
	$(PY) -m pytest -n 2 --dist worksteal

BENCHMARKS ?= query sketch fidelity drift store search indexes probe_table

bench: install
	for name in $(BENCHMARKS); do $(PY) -m benchmarks.$$name || exit 1; done

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache
