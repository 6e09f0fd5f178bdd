# Everything a person does here, by name. `make` alone lists it.
.DEFAULT_GOAL := help
SHELL := /bin/sh
PYTHON := .venv/bin/python
INSTALLED := .venv/.installed .venv-triton/.installed
LOCKS := $(addprefix requirements/,uv.txt dev.txt triton.txt)
CODE := config.py errors.py inference ops storage tasks tests web workers

##@ Use

.PHONY: help
help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} \
		/^##@/ {printf "\n%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: install
install: $(INSTALLED) ## Install what the other commands need (they do so themselves)
	@:

$(INSTALLED) &: $(LOCKS) ops/install.sh
	@ops/install.sh
	@touch $(INSTALLED)

# `exec`, here and below: the signal that stops `make` reaches the program itself.
.PHONY: up
up: install ## Start everything on this machine; Ctrl-C stops it
	@exec $(PYTHON) -m ops.embedded up

.PHONY: demo
demo: install ## Show it at work
	@exec $(PYTHON) -m ops.demo

##@ Check

.PHONY: test
test: install ## Run all tests
	@exec $(PYTHON) -m pytest -n 3 --dist loadfile

.PHONY: test-unit
test-unit: install ## Run the tests that need no server
	@exec $(PYTHON) -m pytest tests/unit

# The demo brings a stack of its own.
.PHONY: test-rabbitmq
test-rabbitmq: install ## Run the end-to-end tests with RabbitMQ as broker
	@exec env TIDEGATE_TEST_BROKER=rabbitmq $(PYTHON) -m pytest -n 3 --dist loadfile \
		tests/e2e tests/integration/test_tasks.py --ignore tests/e2e/test_demo.py

.PHONY: chaos
chaos: install ## Kill everything under load for an hour; writes docs/chaos.md
	@exec $(PYTHON) -m tests.chaos --out docs/chaos.md $(ARGS)

.PHONY: bench
bench: install ## Measure it side by side with others for half an hour; writes docs/benchmarks.md
	@exec $(PYTHON) -m tests.bench --out docs/benchmarks.md $(ARGS)

.PHONY: bench-peers
bench-peers: install .venv-peers/.installed ## The same beside BentoML and Ray Serve
	@exec $(PYTHON) -m tests.bench --only peers --out docs/benchmarks.md $(ARGS)

.venv-peers/.installed: requirements/peers.txt ops/install-peers.sh
	@ops/install-peers.sh
	@touch $@

.PHONY: lint
lint: install ## Look for mistakes and style
	@$(PYTHON) -m ruff check $(CODE)
	@$(PYTHON) -m ruff format --check $(CODE)

.PHONY: types
types: install ## Check the types
	@$(PYTHON) -m mypy $(CODE)

.PHONY: check
check: lint types test ## All of the above

##@ Change

.PHONY: format
format: install ## Rewrite the code in the project's style
	@$(PYTHON) -m ruff check --fix --quiet $(CODE) || true
	@$(PYTHON) -m ruff format $(CODE)

.PHONY: lock
lock: install ## Renew the exact versions in requirements/
	@for name in uv main dev triton peers; do \
		UV_SYSTEM_CERTS=1 .venv/bin/uv pip compile --quiet --upgrade --generate-hashes \
			--universal --python-version 3.11 --no-header --no-emit-index-url \
			$$(test $$name = triton && echo --no-deps) \
			requirements/$$name.in -o requirements/$$name.txt || exit 1; \
	done

.PHONY: clean
clean: ## Remove the environments and caches, not the data in var/
	rm -rf .venv .venv-triton .venv-peers .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
