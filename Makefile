# make demo and make test need only make and Python 3.10 or newer (with venv): they build .venv themselves.
#
#   PYTHON=python3.12          the interpreter that .venv is made from
#   TORCH=torch==2.15.0        the torch that is installed; for one trial beside .venv use `make test-torch`
#   SYSTEM_SITE=1              .venv also sees the packages of PYTHON, and its torch is used if it has one
#   PY=python3                 no .venv at all: run with this interpreter and what it already has
#   ALSO="transformers"        further packages for the optional tests, which are skipped without them
#   ARGS="-k planner"          passed on to pytest, to the demo or to the benchmarks

PYTHON ?= python3
TORCH ?= torch==2.13.0
EXTRAS ?= cli
ALSO ?=
SYSTEM_SITE ?=
ARGS ?=
VENV ?= .venv

ifeq ($(origin PY),command line)
  READY :=
  export PYTHONPATH := src
else
  PY := $(VENV)/bin/python
  # The stamp carries the settings in its name: other settings, another install.
  READY := $(VENV)/.ready-$(shell printf '%s' '$(TORCH) $(EXTRAS) $(ALSO)' | tr -c 'A-Za-z0-9.' '-')
endif

# What is imported is compiled once. Tests start many processes, and torch is installed without (see below).
unexport PYTHONDONTWRITEBYTECODE

# Each file is one worker's, and files come in the order of tests/conftest.py.
SHARED := -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help env demo test pytest long more slow lint trainers trainers-env format bench docs suites figures loops stale wheel test-torch clean

help:            ## this list
	@sed -n 's/^\([a-z-]*:\)[^#]*## /\1\t/p' Makefile | expand -t 14

env: $(READY)    ## build the environment, nothing else

demo: $(READY)   ## the main job on this machine: a plain run beside a run under a budget
	$(PY) -m torchlms demo $(ARGS)

# mypy is one process for a quarter of a minute: it runs beside the first tests, and is heard after the last.
test: $(READY)   ## the environment, ruff, mypy and the tests
	@said=$$(mktemp); $(MAKE) --no-print-directory lint >$$said 2>&1 & lint=$$!; \
	$(MAKE) --no-print-directory pytest; tests=$$?; \
	wait $$lint; lint=$$?; cat $$said; rm $$said; exit $$((tests ? tests : lint))

pytest: $(READY) ## the tests only (ARGS goes to pytest)
	$(PY) -m pytest -v $(SHARED) $(ARGS)

long: $(READY)   ## the tests that take longer than most (tests/long.txt), of which CI runs a third
	$(PY) -m pytest -v $(SHARED) -m 'long and not more and not slow' $(ARGS)

lint: $(READY)   ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

more: $(READY)   ## more of the same: cases and long runs of which `make test` has a part
	$(PY) -m pytest -v $(SHARED) -m 'more and not slow' $(ARGS)

slow: $(READY)   ## the tests that `make test` and `make more` leave out because they take long
	$(PY) -m pytest -v $(SHARED) -m slow $(ARGS)

# An environment that borrows the packages of $(PY) by a path file, so that nothing large is installed twice.
# Naming the borrowed torch keeps pip from taking another. A stamp: other settings, another install.
TRAINERS_VENV ?= build/venv-trainers
TRAINERS_READY := $(TRAINERS_VENV)/.ready
BORROW = $(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth"

trainers-env: $(TRAINERS_READY)  ## the environment of `make trainers`, nothing else

trainers: $(TRAINERS_READY)  ## integrations and examples, with the trainers' own libraries (-m 'not slow': all)
	$(TRAINERS_VENV)/bin/python -m pytest -v -n 2 --dist worksteal \
	  tests/integrations tests/test_examples.py tests/steps $(ARGS)

$(TRAINERS_READY): $(READY) pyproject.toml
	rm -rf $(TRAINERS_VENV)
	$(PY) -m venv --without-pip $(TRAINERS_VENV)
	$(call BORROW,$(TRAINERS_VENV))
	$(PY) -m pip --python $(TRAINERS_VENV)/bin/python install --quiet \
	  "torch==$$($(PY) -c 'import torch; print(torch.__version__)')" \
	  --editable '.[cli,examples,huggingface,keras,lightning]' peft tensorboard
	touch $@

format: $(READY) ## let ruff format and fix what it can
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: $(READY)  ## measure the rows of benchmarks/ anew (needs the GPU named in benchmarks/README.md)
	$(PY) benchmarks/run.py $(ARGS)

figures: $(READY)  ## write the tables of the READMEs from benchmarks/results/
	$(PY) benchmarks/run.py --table

loops: $(READY)  ## write docs/loops.md from a run of the training loops in tests/matrix
	$(PY) -m pytest tests/matrix --write-loops -n 0 -m "slow or not slow" $(ARGS)

docs: $(READY)   ## build the pages of docs/ as a site in build/docs
	$(PY) docs/api.py
	$(PY) -m mkdocs build --strict

suites: $(READY) ## other projects' own tests under LMS: PyTorch's samples, transformers' architectures
	$(PY) benchmarks/suites.py operators --most 20
	$(PY) benchmarks/suites.py modules --most 12
	$(PY) benchmarks/suites.py transformers

stale: $(READY)  ## list result files whose code has changed since they were made
	$(PY) benchmarks/run.py --stale

test-torch:      ## `make test` with another torch, in its own environment: make test-torch TORCH=torch==2.15.0
	$(MAKE) test VENV=build/venv-$(shell printf '%s' '$(TORCH)' | tr -c 'A-Za-z0-9.' '-') TORCH='$(TORCH)'

# The wheel is tried in an environment that does not see src/ and borrows torch, as that of the trainers.
wheel: $(READY)  ## build the wheel and try it in a fresh environment
	rm -rf dist build/wheel-venv
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PY) -m venv --without-pip build/wheel-venv
	$(PY) -m pip --python build/wheel-venv/bin/python install --quiet --no-deps dist/*-py3-none-any.whl
	$(call BORROW,build/wheel-venv)
	cd build && PYTHONPATH= wheel-venv/bin/python ../tests/wheel.py
	@ls -l dist/*.whl

clean:           ## remove the environment and everything that was built
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that the pinned version (and a CPU build where one is at hand) is taken
# before any other package asks for "torch". Of its files a tenth is ever imported: to compile them all would
# take half of the time that this takes. `--group` needs pip 25.1.
ifneq ($(READY),)
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(if $(SYSTEM_SITE),--system-site-packages) $(VENV) \
	  || { rm -rf $(VENV); echo "venv is missing: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	$(PY) -m pip install --quiet --upgrade 'pip>=25.1'
	$(if $(SYSTEM_SITE),$(PY) -c 'import torch' 2>/dev/null ||) $(PY) -m pip install --no-compile '$(TORCH)'
	$(PY) -m pip install --quiet --no-compile --editable '.[$(EXTRAS)]' --group dev $(ALSO)
	rm -f $(VENV)/.ready-*
	touch $@
endif
