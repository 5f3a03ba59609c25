# Needs Python 3.11 or newer with its venv module, and git. Everything is installed into .venv, once.
PYTHON ?= python3
VENV ?= .venv
OUT ?= OUT
JOBS ?= 2

RUN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test test-slow slurm lint format clean

help:
	@echo "make demo       train a ladder of small models on your Python's own library, fit a scaling law, write a report"
	@echo "make test       lint, and the tests that take seconds"
	@echo "make test-slow  the tests that train for minutes"
	@echo "make slurm      the tests on a real Slurm, two nodes of which it starts on this machine, and stops"
	@echo "make lint       ruff alone; make format lets it rewrite"
	@echo "make clean      remove .venv, caches and OUT"

$(STAMP): pyproject.toml
	@echo "== installing slmjax and what it needs into $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "slmjax needs Python 3.11 or newer; say make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@echo "== the plan: widths x token budgets, one trunk for each width and a decayed branch for each budget"
	@$(RUN)/slmjax study plan --study=wsd_ladder
	@echo "== training it on the text of the Python standard library; a second 'make demo' goes on where this one stops"
	@$(RUN)/slmjax study run --study=wsd_ladder --out=$(OUT) --jobs=$(JOBS)
	@echo "== fitting a law to each family (dense, with experts, masked diffusion), comparing them, and writing the report"
	@$(RUN)/slmjax study report --study=$(OUT)/wsd_ladder
	@echo "== open $(OUT)/wsd_ladder/report.html in a browser; ask for more:"
	@echo "   $(RUN)/slmjax forecast $(OUT)/wsd_ladder/fit.json --flops=1e15"

test: lint
	$(RUN)/python -m pytest -n $(JOBS) --dist worksteal

test-slow: $(STAMP)
	$(RUN)/python -m pytest -m slow

# Needs root and Slurm's programs; on Debian: apt-get install --no-install-recommends slurm-wlm slurm-client munge
slurm: $(STAMP)
	@$(RUN)/python tests/slurm_cluster.py check
	$(RUN)/python -m pytest -m slurm

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

format: $(STAMP)
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
