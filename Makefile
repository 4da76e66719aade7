# make demo    set up .venv/, then run the demonstration
# make test    every test that takes seconds        make slow    the tests that take minutes
# make check   what must pass before a commit       make bench   every benchmark
# make cluster the tests that take minutes on a real Slurm
# make soak    ten minutes of reading with every loader
# make clean   remove caches and build products; .venv/, runs/ and data/ stay
#
# PYTHON=python3.12 chooses an interpreter, PYTEST_ARGS="-k penalty" is passed to pytest.
# An installation that was interrupted goes on with the same command.

VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=

# The first interpreter that is new enough; python3, and a message, when there is none.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
ifeq ($(origin PYTHON),undefined)
PYTHON := $(or $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$name -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$name && break; done),python3)
endif

# torchattacks pins an old requests that it never imports; what it does import, we install ourselves.
TORCHATTACKS := torchattacks==3.5.1

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_RETRIES ?= 10
export PIP_RESUME_RETRIES ?= 10
export PIP_DEFAULT_TIMEOUT ?= 60
PIP := $(BIN)/python -m pip

# Inside .venv/, so that they go with it. An environment whose Python does not start is made again.
MADE := $(VENV)/made.stamp
INSTALLED := $(VENV)/installed.stamp
DEVELOP := $(VENV)/develop.stamp
ifneq ($(shell $(BIN)/python -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null && echo works),works)
$(shell rm -f $(MADE) $(INSTALLED) $(DEVELOP))
endif

.PHONY: demo test check bench slow soak cluster clean browser network ffcv slurm strace

demo: $(INSTALLED)
	$(BIN)/guard run experiment=demo

# Two tests at a time, each with one thread: threads of several programs on the same cores stall each other.
test: $(DEVELOP) ffcv browser network slurm
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not soak" -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

slow: $(DEVELOP) ffcv network
	$(BIN)/python -m pytest -m "slow and not cluster" $(PYTEST_ARGS)

cluster: $(DEVELOP) slurm
	$(BIN)/python -m pytest -m "slow and cluster" $(PYTEST_ARGS)

soak: $(DEVELOP) ffcv
	$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)

check: $(DEVELOP) ffcv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory test

bench: $(DEVELOP) ffcv strace
	@for file in benchmarks/[a-z]*.py; do \
	  if [ -e "$$file" ]; then \
	    name=$$(basename "$$file" .py); \
	    echo "== $$name"; \
	    $(BIN)/python -m "benchmarks.$$name" || exit 1; \
	  fi; \
	done

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(MADE):
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no $(PYTHON). Python 3.11 or newer is needed: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
	  echo "$(PYTHON) is no Python of 3.11 or newer: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make environments (no ensurepip). Debian, Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(BIN)/python -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(INSTALLED): $(MADE) setup.py pyproject.toml Makefile
	$(PIP) install --editable .
	$(PIP) install --no-deps $(TORCHATTACKS)
	@touch $@

$(DEVELOP): $(INSTALLED)
	$(PIP) install --editable '.[dev,dali,deepspeed,slurm]'
	@touch $@

# System packages for tests, through apt where root or sudo allows. Without them those tests are skipped, and this says
# so. $(call packages,what needs them,test that they are there,names)
define packages
@if { $(2); } >/dev/null 2>&1; then exit 0; fi; \
if ! command -v apt-get >/dev/null; then \
  echo "$(1) are skipped: $(3) are missing and there is no apt-get."; exit 0; fi; \
if [ "$$(id -u)" = 0 ]; then root=; \
elif sudo -n true 2>/dev/null; then root="sudo -n"; \
else echo "$(1) are skipped: apt-get install $(3) needs root."; exit 0; fi; \
$$root apt-get update -qq || true; \
$$root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(3) \
  || echo "$(1) are skipped: apt-get could not install $(3)."
endef

browser:
	$(call packages,Browser tests,command -v chromium && command -v chromedriver,chromium chromium-driver)

strace:
	$(call packages,Counts of system calls,command -v strace,strace)

# Two machines, as far as the network goes.
network:
	$(call packages,Tests with network namespaces,command -v ip,iproute2)

SLURM_PROGRAMS := export PATH="$$PATH:/usr/sbin"; command -v munged && command -v slurmctld && command -v slurmd && command -v sbatch
slurm:
	$(call packages,Cluster tests,$(SLURM_PROGRAMS),munge slurmctld slurmd slurm-client)

# FFCV is compiled at installation.
FFCV_LIBRARIES := pkg-config --exists opencv4 && pkg-config --exists libturbojpeg
ffcv: $(DEVELOP)
	$(call packages,FFCV's tests,$(FFCV_LIBRARIES),libopencv-dev libturbojpeg0-dev pkg-config)
	@if $(BIN)/python -c 'import ffcv' 2>/dev/null; then exit 0; fi; \
	if $(FFCV_LIBRARIES) 2>/dev/null; then $(PIP) install --editable '.[ffcv]'; fi
