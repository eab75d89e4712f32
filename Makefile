# Everything from a fresh clone, on Python >= 3.10 and g++: `make demo`, `make test`. A virtual environment of its own,
# pinned requirements, the build, the run. A second run neither installs nor compiles what has not changed.
#
#   make test TORCH=2.15.0       another release of torch, in .venv-2.15.0
#   make test PYTHON=python3.12  another interpreter (for a new virtual environment)
#   make test ARGS="-k router"   arguments for pytest; for demo, bench and bench-gpu their own

PYTHON ?= python3
PINNED_TORCH := $(shell sed -n 's/^torch==//p' requirements/torch.txt)
TORCH ?= $(PINNED_TORCH)
VENV ?= $(if $(filter $(PINNED_TORCH),$(TORCH)),.venv,.venv-$(TORCH))
CUDA_BUILD ?= build/cuda
HOSTS ?= $(patsubst requirements/hosts/%.txt,%,$(wildcard requirements/hosts/*.txt))
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CPP_FILES = $(shell git ls-files --cached --others --exclude-standard '*.h' '*.cpp' '*.cuh' '*.cu')
SOURCES := $(shell find csrc cmake -type f)

# The compiled libraries lie beside the sources, so they fit one virtual environment at a time.
ifneq ($(shell cat build/in-place 2>/dev/null),$(abspath $(VENV)))
.PHONY: $(VENV)/.built
endif

.PHONY: help demo test test-hosts lint format tidy bench bench-gpu cuda wheel clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 12

demo: $(VENV)/.built $(VENV)/.demo ## train a language model with MoE layers on real text, beside a plain torch loop
	$(BIN)/python examples/train_text.py $(ARGS)

test: $(VENV)/.built $(VENV)/.test ## every test: Python, C++, the C++ example, packaging
	$(BIN)/python -m pytest $(ARGS)

# Hosts that can't live beside each other get an environment each, with their own packages before the ones they share.
test-hosts: $(HOSTS:%=$(VENV)/hosts/%/.ready) ## the tests against the hosts' real packages; HOSTS="a b" takes some of them
	@set -e; for host in $(HOSTS); do \
	  printf '\n--> %s\n' "$$host"; \
	  wanted=$$(sed -n 's/^# python: //p' requirements/hosts/$$host.txt); \
	  if ! $(BIN)/python -c "import sys; sys.exit(sys.version_info < tuple(map(int, '$${wanted:-3.10}'.split('.'))))"; then \
	    echo "needs Python $$wanted: left out (PYTHON=... with another VENV=... takes it)"; continue; \
	  fi; \
	  FASTMOE_CPP_HOST=$$host $(VENV)/hosts/$$host/bin/python -m pytest \
	    $$(sed -n 's/^# tests: //p' requirements/hosts/$$host.txt) $(ARGS); \
	done

lint: $(VENV)/.lint ## ruff and clang-format, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

format: $(VENV)/.lint ## ruff and clang-format, in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

tidy: $(VENV)/.built $(VENV)/.tidy ## clang-tidy over the C++ of the CPU half (minutes)
	$(BIN)/clang-tidy --quiet $(filter-out csrc/cuda/% csrc/module.cpp,$(filter csrc/%.cpp,$(SOURCES))) -- -fopenmp \
	  $$($(BIN)/python -c "from torch.utils.cpp_extension import include_paths as p; print(*('-isystem' + d for d in p()))") \
	  $$(sed -n 's/.*\(-std=c++[0-9]*\).*/\1/p' build/torch*/temp*/build.ninja | head -1)

bench: $(VENV)/.built $(VENV)/.test ## the CPU kernels beside plain torch, transformers' blocks and the BLAS bound
	$(BIN)/python -m fastmoe_cpp bench $(ARGS)

bench-gpu: $(VENV)/.built $(VENV)/.test ## the GPU kernels beside their peers and the GEMM bound
	$(BIN)/python benchmarks/gpu_layer.py $(ARGS)

cuda: $(VENV)/.torch ## compile the CUDA half too, whether a GPU is here or not, into $(CUDA_BUILD)
	FORCE_CUDA=1 $(BIN)/python setup.py build --build-base $(CUDA_BUILD) --build-lib $(CUDA_BUILD)/lib

wheel: $(VENV)/.torch ## dist/*.whl and the source archive
	$(BIN)/python -m build --no-isolation

clean: ## what was built; the virtual environments stay
	rm -rf build dist *.egg-info fastmoe_cpp/*.so fastmoe_cpp/_build.py fastmoe_cpp/include fastmoe_cpp/share
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# --- the stamps -------------------------------------------------------------------------------------------------------

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastmoe_cpp needs Python >= 3.10, and $(PYTHON) is %d.%d: name another with PYTHON=..." % sys.version_info[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) cannot make virtual environments: install its venv package (Debian: python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: requirements/torch.txt requirements/build.txt | $(VENV)/.created
	$(PIP) torch==$(TORCH) -r requirements/build.txt
	@touch $@

$(VENV)/.built: $(SOURCES) setup.py pyproject.toml $(VENV)/.torch
	@command -v $(firstword $(or $(CXX),c++)) >/dev/null || { echo "fastmoe_cpp needs a C++ compiler: install g++"; exit 1; }
	@echo "compiling what has changed (everything: some minutes)"
	$(PIP) --no-build-isolation --no-deps -e .
	@mkdir -p build && echo $(abspath $(VENV)) > build/in-place
	@touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.lint $(VENV)/.tidy: $(VENV)/.%: requirements/%.txt | $(VENV)/.created
	$(PIP) -r $<
	@touch $@

# numpy and friends after torch, so that torch's own pins decide
$(VENV)/.demo $(VENV)/.test: | $(VENV)/.torch
$(VENV)/.test: requirements/demo.txt

# torch, the tests' requirements and fastmoe_cpp itself are the main environment's, without a second copy.
$(VENV)/hosts/%/.ready: requirements/hosts/%.txt $(VENV)/.test $(VENV)/.built
	$(BIN)/python -m venv $(@D)
	@shared=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  own=$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  echo "import site; site.addsitedir('$$shared')" > "$$own/shared.pth"
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $$(sed -n 's/^# pip: //p' $<) -r $<
	@touch $@
