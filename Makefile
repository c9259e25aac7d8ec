# One door for developers; CI uses the same targets. Needs Python 3.11 or newer and make, everything else goes into .venv.
#
#   make run      serve the examples on port 8000, with a Valkey of their own (PORT=..., APP=...)
#   make fast     the tests that start no process and no server: 27 s of processor time, about 30 s on a machine with
#                 nothing else to do
#   make test     all tests, two files at a time (ARGS="tests/pure/test_codec.py -k numpy" for some)
#   make coverage make test, and what share of the code ran, in child processes too: the total, and modules under 90 %
#   make browser install Chromium where that can be done, test the console in it, and take the pictures of its page
#   make check    ruff, its formatter and mypy
#   make format   put the code into the form that `make check` asks for
#   make bench    measure the tables of benchmarks/results.md (ARGS="calls queues" for some of its sections,
#                 BENCH_PEERS=dir adds the peers)
#   make chaos    break everything under load, for 85 minutes (ARGS="--part 2/11", "--slice", "--runs K1,K5")
#   make docs     run what README.md and docs/ show
#   make docs-site  build the documentation site into build/site (VERSION=...); it installs its generator first
#   make tables   write what follows from the code: tables of docs/configuration.md, and what the Helm chart renders
#   make clean    remove .venv and caches

PORT ?= 8000
APP ?= examples.everything
ARGS ?=
VENV := .venv
READY := $(VENV)/.ready

.PHONY: run fast test coverage browser check format bench chaos docs docs-site tables clean
.DEFAULT_GOAL := run

run: $(READY)
	@exec $(VENV)/bin/qserve run $(APP) --port $(PORT)

test: $(READY)
	@$(VENV)/bin/python -m pytest $(or $(ARGS),-n 2 --dist loadfile)

fast: $(READY)
	@$(VENV)/bin/python -m pytest tests/pure -q $(ARGS)

coverage: $(READY)
	@rm -f .coverage .coverage.*; status=0; \
	$(VENV)/bin/coverage run -m pytest $(or $(ARGS),-n 2 --dist loadfile) || status=$$?; \
	$(VENV)/bin/coverage combine --quiet && \
	$(VENV)/bin/coverage report | awk 'NR <= 2 || /^TOTAL/ || $$NF + 0 < 90'; exit $$status

browser: $(READY)
	@sh .ci/install-programs >/dev/null || echo "Chromium cannot be installed here"
	@mkdir -p docs/pictures && QSERVE_TEST_PICTURES=docs/pictures \
	$(VENV)/bin/python -m pytest -q tests/instance/console/test_browser.py $(ARGS)

check: $(READY)
	@status=0; $(VENV)/bin/ruff check . || status=$$?; $(VENV)/bin/ruff format --check . || status=$$?; \
	$(VENV)/bin/mypy || status=$$?; exit $$status

format: $(READY)
	@$(VENV)/bin/ruff check --fix-only --quiet .; $(VENV)/bin/ruff format .

bench: $(READY)
	@$(VENV)/bin/python -m benchmarks.bench $(ARGS)

chaos: $(READY)
	@$(VENV)/bin/python -m tests.faults.chaos $(ARGS)

docs: $(READY)
	@$(VENV)/bin/python -m pytest tests/instance/test_docs.py

docs-site: $(READY)
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --editable '.[docs]'
	@$(VENV)/bin/python docs/build_site.py $(VERSION)

tables: $(READY)
	@$(VENV)/bin/python -m tests.support.tables
	@$(VENV)/bin/python -m tests.support.chart

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .coverage .coverage.*

# Written last, so that a set-up that was broken off is done again; done again too when pyproject.toml changes.
$(READY): pyproject.toml
	@python=$$(PYTHON="$(PYTHON)" sh .ci/find-python) && \
	echo "setting up $(VENV) with $$($$python --version) (once, about a minute) ..." && \
	$$python -m venv --clear $(VENV) && \
	$(VENV)/bin/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
	@$(VENV)/bin/python -m compileall -q qserve gateway workers examples  # else each process does, where none may write
	@touch $@
