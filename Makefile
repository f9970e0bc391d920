# One command for each habit. Every target sets up what it needs: a .venv, pinned by constraints.txt.
# Needs make and Python >= 3.10 (PYTHON=python3.12 picks another); `ld` or a C compiler makes cached kernels load faster.
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.stamp
MINUTES ?= 10

.PHONY: demo test gpu-test gpu-all sanitize bench fuzz lint format types inspect sass-diff doctor clean

demo: $(STAMP)  ## KDA's error and speed, a small Kimi Linear that answers from a long context; on a Hopper GPU, else the CPU
	$(BIN)/python -m kda_cute demo

test: $(STAMP)  ## all tests; its end says how many of those for the GPU ran, and why not
	$(BIN)/python -m pytest -n auto $(ARGS)

gpu-test: $(STAMP)  ## only the GPU tests, one process
	$(BIN)/python -m pytest -m gpu $(ARGS)

gpu-all: $(STAMP)  ## all that a kernel change has to pass on a Hopper GPU: GPU tests, 5,000 random calls, the sanitizers
	$(BIN)/python -m tests.gpu.everything $(ARGS)

sanitize: $(STAMP)  ## compute-sanitizer's four tools over every configuration; needs a Hopper GPU and the CUDA toolkit
	$(BIN)/python -m kda_cute warmup --jobs 8
	for tool in memcheck racecheck synccheck initcheck; do \
	  compute-sanitizer --tool $$tool --error-exitcode 1 $(BIN)/python -m tests.gpu.sanitize || exit 1; done

bench: $(STAMP)  ## kda-cute beside its peers; needs a Hopper GPU. ARGS="--suite gates --out build/bench" for another suite
	$(BIN)/python -m bench --check
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[bench]'
	$(BIN)/python -m bench $(ARGS)

fuzz: $(STAMP)  ## random examples for MINUTES=10; failing ones are kept and replayed by `make test`
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mypy does not follow an editable install's import hook, so it gets the installed layout as links.
types: $(STAMP)
	rm -rf build/types && mkdir -p build/types/kda_cute
	ln -s $(CURDIR)/kda_cute/* $(CURDIR)/kernels $(CURDIR)/reference $(CURDIR)/examples build/types/kda_cute/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p kda_cute

inspect: $(STAMP)  ## registers, shared memory, spills and instruction counts of every kernel; no GPU needed
	$(BIN)/python -m kda_cute inspect

sass-diff: $(STAMP)  ## whether machine code is that of a commit: BASE=HEAD~1 (ARGS="CONFIG ..." for some); no GPU needed
	$(BIN)/python -m tests.sass_diff $(BASE) $(ARGS)

doctor: $(STAMP)
	$(BIN)/python -m kda_cute doctor

clean:
	rm -rf $(VENV) build dist *.egg-info

# Made anew when the pins or the project's metadata change. The build tool is pinned too, hence no build isolation.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python >= 3.10 needed; set PYTHON=..."; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
